"""Offline W&B runs of one run directory: one folder for each start of the run, merged into one for `wandb sync`.

metrics.csv and samples.jsonl hold what a run logged, each step once however often it was killed and resumed. The merged
folder is written aside from them; values and artifacts of other projects' callbacks are taken from the old folders. It
replaces these once it is complete, so no interruption loses anything, and a second merge finds nothing to do.
"""

import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import wandb

from callbacks.loggers.wandb_content import SAMPLES, define_metrics, log_artifact, with_samples
from callbacks.loggers.wandb_file import read_records, read_rows
from gpt2lab.reports.samples_jsonl import Sample, read_samples
from gpt2lab.storage.metrics_csv import STEP, read_metrics
from gpt2lab.storage.report_json import FINAL_SCORE, read_report

log = logging.getLogger(__name__)
ASIDE = "merging.tmp"
OWN_TYPES = ("run_table", "job", "code", "wandb-run-incremental-table")  # of artifacts that W&B creates itself
WRITE_SECONDS, POLL_SECONDS = 20, 0.05


def merge(
    run_dir: Path, start: Callable[[Path], Any], params: dict[str, Any], model: Path | None, exit_code: int
) -> bool:
    """Merge the offline runs into one, unless it is one and complete; return whether there was anything to merge.

    Without a metrics.csv they are left as they are.

    Args:
        start: starts an offline W&B run in a folder.
        params: the configuration of the run.
        model: folder of the model that is logged as an artifact.
    """
    if not offline_folders(run_dir) or not read_metrics(run_dir) or is_complete(run_dir):
        return False
    run = start(aside_folder(run_dir))
    files = Path(run.dir)
    try:
        define_metrics(run)
        run.config.update(params)
        table = None
        for step, values, samples in merged_rows(run_dir):
            table = with_samples(table, samples)
            run.log({STEP: step, **values, **({SAMPLES: table} if samples else {})})
        for artifact, aliases in foreign_artifacts(run_dir):
            run.log_artifact(artifact, aliases=aliases)
        report = read_report(run_dir)
        run.summary.update({name: report[name] for name in FINAL_SCORE if report.get(name) is not None})
        for copy in copy_media(run_dir, files):
            run.save(copy, base_path=files, policy="now")
        if model is not None:
            log_artifact(run, model)
    finally:
        run.finish(exit_code=exit_code)
    wait_until_written(files.parent)
    replace_folders(run_dir, files.parent)
    return True


def offline_folders(run_dir: Path) -> list[Path]:
    """Return the folders of offline runs, the oldest first."""
    return sorted(folder for folder in (run_dir / "wandb").glob("offline-run-*") if folder.is_dir())


def is_complete(run_dir: Path) -> bool:
    """Whether one folder has the rows of metrics.csv and the samples, each step once and in order."""
    files = _files(run_dir)
    if len(offline_folders(run_dir)) != 1 or len(files) != 1:
        return False
    rows, wanted = read_rows(files[0]), read_metrics(run_dir)
    count = Counter(row.get(STEP) for row in rows)
    if any(count[sample.step] != 1 for sample in read_samples(run_dir)):
        return False
    columns = _columns(wanted)
    logged = [row for row in rows if columns & row.keys()]
    return [row.get(STEP) for row in logged] == [int(row[STEP]) for row in wanted] and all(
        name in row for row, values in zip(logged, wanted, strict=True) for name, value in values.items() if value
    )


def merged_rows(run_dir: Path) -> Iterator[tuple[int, dict[str, Any], list[Sample]]]:
    """Yield (step, values, samples) in order: one row for a step, and another one where a name was logged again."""
    rows: dict[int, dict[str, Any]] = {}
    samples: dict[int, list[Sample]] = {}
    metrics = read_metrics(run_dir)
    for texts in metrics:
        rows[int(texts[STEP])] = {name: float(text) for name, text in texts.items() if text and name != STEP}
    for sample in read_samples(run_dir):
        samples.setdefault(sample.step, []).append(sample)
    last = max([*rows, *samples], default=0)
    known = {STEP, SAMPLES, *_columns(metrics)}
    others: dict[int, list[dict[str, Any]]] = {}
    for file in _files(run_dir):
        for step, own in _foreign_rows(file, known).items():
            names = {name for row in own for name in row}
            earlier = {name: value for row in others.get(step, []) for name, value in row.items() if name not in names}
            others[step] = [{**earlier, **own[0]}, *own[1:]] if step <= last else []
    for step in sorted({*rows, *samples, *(step for step, own in others.items() if own)}):
        first, *more = others.get(step) or [{}]
        yield step, {**first, **rows.get(step, {})}, samples.get(step, [])
        yield from ((step, row, []) for row in more)


def _foreign_rows(file: Path, known: set[str]) -> dict[int, list[dict[str, Any]]]:
    """Return step → rows of other names than the known ones; a row has all until a name is logged again."""
    found: dict[int, list[dict[str, Any]]] = {}
    for row in read_rows(file):
        added = {name: value for name, value in row.items() if name not in known}
        if not added or not isinstance(row.get(STEP), int):
            continue
        own = found.setdefault(row[STEP], [])
        if own and not own[-1].keys() & added.keys():
            own[-1].update(added)
        else:
            own.append(added)
    return found


def foreign_artifacts(run_dir: Path) -> Iterator[tuple[Any, list[str]]]:
    """Yield (artifact, aliases) of those that callbacks of other projects logged, each version once.

    The exported model and tables are logged anew by the merge.
    """
    seen = set()
    for record in (record for file in _files(run_dir) for record in read_records(file) if record.HasField("artifact")):
        stored = record.artifact
        is_own = stored.type in OWN_TYPES or (stored.type, stored.name) == ("model", f"model-{stored.run_id}")
        if is_own or (stored.name, stored.digest) in seen:
            continue
        seen.add((stored.name, stored.digest))
        artifact = wandb.Artifact(stored.name, stored.type, stored.description, json.loads(stored.metadata or "{}"))
        try:
            for content in stored.manifest.contents:
                if content.ref:
                    artifact.add_reference(content.ref, content.path, checksum=False)
                else:
                    artifact.add_file(content.local_path, content.path, policy="immutable")
        except (OSError, ValueError) as error:
            log.warning("The artifact %s is missing in the merged W&B run: %s", stored.name, error)
            continue
        yield artifact, [alias for alias in stored.aliases if alias != "latest"]


def _files(run_dir: Path) -> list[Path]:
    return [file for folder in offline_folders(run_dir) for file in folder.glob("*.wandb")]


def _columns(metrics: list[dict[str, str]]) -> set[str]:
    return {name for row in metrics[:1] for name in row} - {STEP}


def copy_media(run_dir: Path, files: Path) -> list[Path]:
    """Copy images and tables of the old folders, which their rows name, except samples; return the copies."""
    copies = []
    for folder in offline_folders(run_dir):
        for file in (path for path in (folder / "files" / "media").rglob("*") if path.is_file()):
            copy = files / file.relative_to(folder / "files")
            if not file.name.startswith(f"{SAMPLES}_") and not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, copy)
                copies.append(copy)
    return copies


def wait_until_written(folder: Path) -> None:
    """Wait until W&B's service has written the last record of a finished run, after `finish` has returned.

    Raises:
        TimeoutError: it has not within `WRITE_SECONDS`.
    """
    for _ in range(int(WRITE_SECONDS / POLL_SECONDS)):
        if any(record.HasField("exit") for file in folder.glob("*.wandb") for record in read_records(file, 2)):
            return
        time.sleep(POLL_SECONDS)
    raise TimeoutError(f"{folder} was not written completely within {WRITE_SECONDS} seconds")


def aside_folder(run_dir: Path) -> Path:
    """Return an empty folder for the merged run; one of a merge that was interrupted is removed."""
    aside = run_dir / "wandb" / ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def replace_folders(run_dir: Path, merged: Path) -> None:
    """Move the merged folder to those it replaces, then delete them."""
    old = offline_folders(run_dir)
    target = run_dir / "wandb" / merged.name
    while target.exists():  # of the same second
        target = target.with_name(f"{target.name}-merged")
    merged.rename(target)
    for folder in old:
        _delete(folder)
    for link in (path for path in (run_dir / "wandb").iterdir() if path.is_symlink() and not path.exists()):
        link.unlink()
    latest = run_dir / "wandb" / "latest-run"
    latest.unlink(missing_ok=True)
    latest.symlink_to(target.name)
    shutil.rmtree(run_dir / "wandb" / ASIDE, ignore_errors=True)


def _delete(folder: Path) -> None:
    shutil.rmtree(folder)
