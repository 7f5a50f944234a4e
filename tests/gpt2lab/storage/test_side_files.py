"""Side files of a run directory: only checkpoints determine where a run resumes; damage to other files is repaired."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2lab.evaluation.document_losses import FILE as DOCUMENTS
from gpt2lab.evaluation.document_losses import DocumentLosses, read_document_losses, write_document_losses
from gpt2lab.reports.run_report import build_report, write_report
from gpt2lab.reports.samples_jsonl import Sample, append_samples, drop_samples_after, read_samples
from gpt2lab.reports.side_files import repair
from gpt2lab.storage import damaged_files
from gpt2lab.storage.checkpoint_ledger import (
    checkpoint_folder,
    checkpoint_step,
    commit_checkpoint,
    drop_checkpoints_after,
    newest_good_checkpoint,
    read_entries,
    scratch_file,
)
from gpt2lab.storage.metrics_csv import MetricsFile, read_metrics
from gpt2lab.storage.report_json import read_report
from tests.conftest import Train

LEDGER = "checkpoints/index.json"
Damage = Callable[[Path], object]
DIGITS = "3" * 5000  # Python parses no integer of so many


def change(old: str, new: str) -> Damage:
    return lambda file: file.write_text(file.read_text().replace(old, new, 1))


def entry(**values: object) -> Damage:
    """Replace values of the newest ledger entry; None as a value stays None, `...` removes the key."""

    def damage(file: Path) -> None:
        ledger = json.loads(file.read_text())
        newest = {**ledger["checkpoints"][-1], **values}
        ledger["checkpoints"][-1] = {key: value for key, value in newest.items() if value is not ...}
        file.write_text(json.dumps(ledger))

    return damage


def other(make: Callable[[Path], object]) -> Damage:
    def damage(file: Path) -> None:
        file.unlink()
        make(file)

    return damage


def reordered(change: Callable[[list[Any]], list[Any]]) -> Damage:
    def damage(file: Path) -> None:
        file.write_text(json.dumps({"checkpoints": change(json.loads(file.read_text())["checkpoints"])}))

    return damage


def written(text: str) -> Damage:
    return lambda file: file.write_text(text)


EVERY: dict[str, Damage] = {
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "tail zeroed": lambda file: file.write_bytes(file.read_bytes()[:-20] + bytes(20)),
    "cut within a line": lambda file: file.write_bytes(file.read_bytes()[:-20]),
    "not UTF-8": lambda file: file.write_bytes(file.read_bytes()[:-20] + b"\xff\xfe" + file.read_bytes()[-18:]),
    "a folder": other(lambda file: file.mkdir()),
    "a link to nothing": other(lambda file: file.symlink_to("/nowhere/at/all")),
    "a pipe": other(os.mkfifo),
    "unreadable": other(lambda file: file.symlink_to("/proc/self/mem")),  # for root too
    "read-only": lambda file: file.chmod(0o444),
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
}
OWN: dict[str, dict[str, Damage]] = {
    "metrics.csv": {
        "an invalid line": change("\n3,", "\n3;"),
        "a value that is no number": change("\n3,3", "\n3,x"),
        "an invalid header": change("step", "stop"),
        "a step of 5000 digits": change("\n3,", f"\n{DIGITS},"),
    },
    "samples.jsonl": {
        "an invalid line": change('{"step": 3', '{"step": 3,,'),
        "a line of another type": change('{"step": 1', '[1]\nnull\n7\n{"step": 1'),
        "a step that is no number": change('"step": 3', '"step": "x"'),
        "a step of 5000 digits": change('"step": 3', f'"step": {DIGITS}'),
        "cut within a character": lambda file: file.write_bytes(file.read_bytes().rpartition(b"\xa4")[0]),
    },
    "report.json": {
        "a list": lambda file: file.write_text("[]"),
        "null": lambda file: file.write_text("null"),
        "a number": lambda file: file.write_text("7"),
        "a number of 5000 digits": change('"metrics": {', f'"seconds": {DIGITS}, "metrics": {{'),
        "values of other types": change('"metrics": {', '"data": null, "seconds": "x", "metrics": [], "rest": {'),
    },
    DOCUMENTS: {
        "a list": lambda file: file.write_text("[]"),
        "values of other types": change('"nats": [', '"nats": ["x", '),
        "lists of other lengths": change('"nats": [', '"nats": [1.0, '),
        "numbers as text": written('{"group": [0], "nats": ["1.0"], "targets": ["3"], "data": ""}'),
        "an infinite group": written('{"group": [Infinity], "nats": [1.0], "targets": [3], "data": ""}'),
        "deeply nested": lambda file: file.write_text("[" * 200_000),
    },
    LEDGER: {
        "a list": lambda file: file.write_text("[]"),
        "null": lambda file: file.write_text("null"),
        "a number": lambda file: file.write_text("7"),
        "no list of entries": lambda file: file.write_text('{"checkpoints": {"file": 1}}'),
        "no file": entry(file=None),
        "a file outside the run": entry(file="../../x"),
        "an absolute file": entry(file="/etc/passwd"),
        "another file's name": entry(file="step-000002.ckpt"),
        "a step that is no number": entry(step="x"),
        "a step of 5000 digits": change('"step": 4', f'"step": {DIGITS}'),
        "negative bytes": entry(bytes=-1),
        "no checksum": entry(sha256=...),
        "another file's checksum": entry(sha256="0" * 64),
        "another file's size": entry(bytes=7),
        "entries in another order": reordered(lambda entries: entries[::-1]),
        "an entry twice": reordered(lambda entries: [*entries, *entries]),
        "only an old entry": reordered(lambda entries: entries[:1]),
        "an unknown key": entry(comment="mine"),
        "deeply nested": lambda file: file.write_text("[" * 100_000),
    },
}
# Damages that lose no data and need no report
HARMLESS = {(name, "read-only") for name in OWN} | {
    (name, "missing") for name in OWN if name not in ("metrics.csv", LEDGER)
}
HARMLESS |= {("samples.jsonl", "empty"), (LEDGER, "an unknown key"), (LEDGER, "an entry twice")}
HARMLESS |= {(LEDGER, "entries in another order")}
WITHOUT_COPY = ("missing", "empty", "another file's checksum", "another file's size", "only an old entry")


def make_run(run: Path) -> None:
    """Make a run of four steps that was stopped at its checkpoint."""
    metrics = MetricsFile(run)
    for step in (1, 2, 3, 4):
        metrics.write(step, {"train/loss": 3 + 1 / step, "tokens": 100.0 * step})
        append_samples(run, [Sample(step, "def f(", f"x{step}): # ä", "greedy")])
        if step % 2 == 0:
            checkpoint_folder(run).mkdir(exist_ok=True)
            torch.save({"global_step": step}, scratch_file(run, step))
            commit_checkpoint(run, step, 2)
    write_document_losses(run, DocumentLosses([0, 1, 2], [3.5, 2.0, 9.0], [10, 5, 30], "hash"))
    write_report(run, build_report(run, "stopped", {"seconds": 1.0, "watched_metric": "train/loss"}))


@pytest.mark.parametrize(("file", "damage"), [(name, each) for name in OWN for each in (*EVERY, *OWN[name])])
def test_a_damaged_side_file_is_repaired_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: str
):
    caplog.set_level(logging.WARNING)
    damaged_files.warn_once.cache_clear()
    make_run(tmp_path)
    expected = read_metrics(tmp_path), read_samples(tmp_path)
    {**EVERY, **OWN[file]}[damage](tmp_path / file)
    is_lost = damage == "missing" or damaged_files.is_unreadable(tmp_path / file)
    was = None if is_lost else (tmp_path / file).read_bytes()

    newest = newest_good_checkpoint(tmp_path)
    assert newest is not None
    assert checkpoint_step(newest) == 4, "checkpoints decide"
    (
        read_metrics(tmp_path),
        read_samples(tmp_path),
        read_report(tmp_path),
        read_document_losses(tmp_path),
    )  # also for a reader that repairs nothing
    assert not list(tmp_path.rglob("*.damaged*"))
    caplog.clear()
    damaged_files.warn_once.cache_clear()

    assert newest_good_checkpoint(tmp_path) == newest
    repair(tmp_path)
    drop_samples_after(tmp_path, 4)
    drop_checkpoints_after(tmp_path, 4)
    MetricsFile(tmp_path).write(5, {"train/loss": 2.5, "tokens": 500.0})
    append_samples(tmp_path, [Sample(5, "def f(", "y", "greedy")])
    write_report(tmp_path, build_report(tmp_path, "finished", {}))
    about = [message for message in caplog.messages if Path(file).name in message]
    assert len(about) == ((file, damage) not in HARMLESS), caplog.messages

    kept = tmp_path / f"{file}.damaged"
    lost = (file, damage) not in HARMLESS and damage not in WITHOUT_COPY
    assert kept.exists() or kept.is_symlink() or not lost
    if lost and was is not None:
        assert kept.read_bytes() == was
    rows, samples = read_metrics(tmp_path), read_samples(tmp_path)
    assert [row for row in rows if row["step"] != "5"] == [row for row in expected[0] if row in rows]
    assert [sample for sample in samples if sample.step != 5] == [sample for sample in expected[1] if sample in samples]
    assert (rows[-1]["step"], samples[-1].step) == ("5", 5)
    spared = 4 if (file, damage) in HARMLESS and damage not in ("missing", "empty") else 3
    for name, left in (("metrics.csv", rows), ("samples.jsonl", samples)):
        whole_is_lost = ("zeroed", "a folder", "a pipe", "unreadable", "a link to nothing", "missing", "empty")
        whole_is_lost += ("an invalid header",)
        assert len(left) - 1 >= (4 if name != file else 0 if damage in whole_is_lost else spared - 1)
    assert read_report(tmp_path)["status"] == "finished"
    assert [one.step for one in read_entries(tmp_path)] == [2, 4]


@pytest.mark.parametrize("damage", ["missing", "empty", "a folder", "cut within a line", "a link to nothing"])
def test_metrics_damaged_during_a_run_continue(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    metrics = MetricsFile(tmp_path)
    for step in (1, 2, 3):
        metrics.write(step, {"train/loss": 3 + 1 / step, "tokens": 1e9})
    before = read_metrics(tmp_path)
    EVERY[damage](metrics.path)
    metrics.write(3, {"val/loss": 2.5})
    metrics.write(4, {"train/loss": 3.0, "tokens": 2e9})
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows[-2:]] == ["3", "4"]
    assert (rows[-2]["train/loss"], rows[-2]["val/loss"]) == (before[-1]["train/loss"], "2.5")
    assert len(rows) == (4 if damage == "cut within a line" else 2)
    assert "was removed or changed by another program" in caplog.text
    assert (tmp_path / "metrics.csv.damaged").is_symlink() or damage != "a link to nothing"


def test_lost_rows_are_named_by_their_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    make_run(tmp_path)
    change("\n3,", "\n\0,")(tmp_path / "metrics.csv")
    repair(tmp_path)
    assert "1 lines are unreadable, so rows between steps 3 and 3 are lost" in caplog.text
    assert [row["step"] for row in read_metrics(tmp_path)] == ["1", "2", "4"]


@pytest.mark.parametrize("file", ["last", "logs", "wandb", ".hydra", "report.html", "hf"])
def test_file_or_folder_of_another_kind_is_replaced(tmp_path: Path, file: str):
    make_run(tmp_path)
    path = checkpoint_folder(tmp_path) / file if file == "last" else tmp_path / file
    if file == "last":
        path.unlink()
        (path / "mine").mkdir(parents=True)
        torch.save({"global_step": 6}, scratch_file(tmp_path, 6))
        commit_checkpoint(tmp_path, 6, 2)
        assert path.resolve().name == "step-000006.ckpt"
    elif file == "report.html":
        path.unlink()
        path.mkdir()
        repair(tmp_path)
    else:
        path.write_text("mine")
        repair(tmp_path)
        assert path.is_dir() or not path.exists() or file == "hf"
    if file != "hf":
        assert path.with_name(f"{file}.damaged").exists()


def test_a_run_with_every_side_file_damaged_is_continued(tmp_path: Path, tiny: list[str], train_here: Train):
    """The run resumes from its checkpoint with resume=auto; a sweep and a teacher read it before that."""
    keys = [key for key in tiny if not key.startswith("callbacks")]
    keys += ["callbacks.samples.max_new_tokens=4", "callbacks.checkpoint.verify_export=false", "checkpoint_every=2"]
    keys += ["log_every=1", "steps=6", "name=mine"]
    assert train_here(*keys).code == 0
    run = tmp_path / "runs" / "pretrain" / "mine"
    unbroken = (run / "hf" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "hf")
    (run / "hf").write_text("mine")
    checkpoint_folder(run).joinpath("step-000006.ckpt").unlink()
    for file, damage in (("metrics.csv", "\n3,"), ("samples.jsonl", '"step": 6, "prompt"'), (LEDGER, '"file"')):
        change(damage, f"\n{damage[:4]}\0\n")(run / file)
    (run / "report.json").unlink()
    (run / "report.json").mkdir()
    answer = train_here(*keys, "resume=auto")
    assert answer.code == 0, answer.stderr
    assert "Traceback" not in answer.stderr
    for name in ("metrics.csv", "index.json", "report.json", "hf"):
        assert sum(f"/{name} is" in line for line in answer.stderr.splitlines()) == 1, answer.stderr
    assert (run / "hf" / "model.safetensors").read_bytes() == unbroken
    assert read_report(run)["status"] == "finished"
    answer = train_here("resume=runs/pretrain/mine")
    assert (answer.code, "damaged" in answer.stderr) == (0, False), answer.stderr
    whole = {path: path.read_bytes() for path in (run / "hf").iterdir()}
    for name, content in (
        ("model.safetensors", unbroken[:-100] + bytes(100)),
        ("tokenizer.json", b""),
    ):
        (run / "hf" / name).write_bytes(content)
        answer = train_here("resume=runs/pretrain/mine")
        assert (answer.code, answer.stderr.count("is missing or damaged and is written again")) == (0, 1), answer.stderr
        assert {path: path.read_bytes() for path in (run / "hf").iterdir()} == whole
