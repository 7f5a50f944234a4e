"""WeightsAndBiases: one W&B run per job, online if this machine is logged in, else offline, without prompts.

After any W&B error a warning is logged once, and training continues without it. No call takes longer than its limit
(bounded_calls.py), so neither a server nor W&B's service delays a run or the end of its process.
"""

import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from wandb.sdk.lib.noop_run import init_noop_run

from callbacks.loggers.bounded_calls import CALL_SECONDS, SERVICE_EXIT, BoundedCalls, end_service, first_line
from callbacks.loggers.offline_runs import merge, merged_rows, wait_until_written
from callbacks.loggers.protocols import RunLabels
from callbacks.loggers.wandb_content import SAMPLES, define_metrics, log_artifact, use_inputs, with_samples
from callbacks.loggers.wandb_mode import chosen_mode
from callbacks.loggers.wandb_resume import Best, RowNumbers
from gpt2lab.reports.samples_jsonl import Sample
from gpt2lab.storage.atomic_files import write_text
from gpt2lab.storage.damaged_files import set_aside
from gpt2lab.storage.metrics_csv import STEP
from gpt2lab.storage.report_json import FINISHED, read_report

log = logging.getLogger(__name__)

RUN_ID = re.compile(r"[0-9A-Za-z_-]+")
ONLINE_FOLDERS = "wandb/run-*-*"  # time and run id
INIT_SECONDS = 30  # to wait for the server
FINISH_SECONDS = 30  # for the rest of the data at the end of an online run
UPLOAD_SECONDS = 600  # the same with a model
# Methods of a W&B run that pass data to its service, which callbacks of other projects call
METHODS: tuple[str, ...] = ("define_metric", "watch", "unwatch", "alert", "write_logs", "mark_preempting")
FILE_METHODS: tuple[str, ...] = ("log_artifact", "use_artifact", "link_artifact", "upsert_artifact", "finish_artifact")
FILE_METHODS += ("log_model", "use_model", "save", "log_code", "finish")


class WeightsAndBiases(WandbLogger):
    """Lightning's WandbLogger in `<run_dir>/wandb`, without failures or delays of training.

    Metrics of one step form one row, which is logged when the next step begins. The run id is stored in the folder, so
    a resumed job continues the W&B run. Online that is rewound to the checkpoint; if the server does not allow it,
    the steps that it has are not logged again.

    Args:
        project: W&B project.
        mode: auto, or W&B's online, offline or disabled; WANDB_MODE and WANDB_DISABLED take precedence.
        group: group of the run; empty: that of the labels.
        job_type: kind of the run; empty: that of the labels.
        tags: added to those of the labels.
        log_model: none, or final: log the exported model as an artifact when the run is finished.
    """

    def __init__(
        self,
        run_dir: str,
        project: str = "gpt2-lab",
        mode: str = "auto",
        group: str = "",
        entity: str = "",
        tags: Sequence[str] | None = None,
        notes: str = "",
        job_type: str = "",
        log_model: str = "none",
    ) -> None:
        super().__init__(save_dir=run_dir, project=project)
        self._experiment: Any = None
        self.run_dir = Path(run_dir)
        self.mode = mode
        self.group, self.entity, self.notes, self.job_type = group, entity, notes, job_type
        self.tags = tuple(tags or ())
        self.logs_model = log_model != "none"
        self.calls = BoundedCalls()
        self.labels = RunLabels(self.run_dir.name)
        self._row: dict[str, Any] = {}
        self._step = 0
        self._logged_step = -1  # last one that a resumed run logged before
        self._is_continued = False  # whether the server has earlier rows of this run
        self._numbers: RowNumbers | None = None  # of online runs
        self._best = Best()
        self._samples: wandb.Table | None = None
        self._params: dict[str, Any] = {}

    def set_labels(self, labels: RunLabels) -> None:
        self.labels = labels
        self._step = labels.completed
        self.calls.is_quiet = not labels.is_requested

    @property
    def name(self) -> str:
        """Folder below the run directory where a ModelCheckpoint without `dirpath` writes `checkpoints/`."""
        return "lightning"

    @property
    def version(self) -> str:
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, which is started at the first use; one that does nothing if W&B is disabled or has failed."""
        if self._experiment is None:
            self._experiment = self.calls.call(self._start, None, 4 * INIT_SECONDS + 10) or _no_run()
            if self._is_continued:
                self._log_missing_rows()
        elif self.calls.failure and not self._experiment.disabled:
            self._experiment = _no_run()
        return self._experiment

    def run_id(self) -> str:
        """Return the stored id of the W&B run; a new one is stored first."""
        file = self.run_dir / "wandb" / "run-id"
        known = file.read_bytes().decode(errors="replace") if file.is_file() else ""
        if known and RUN_ID.fullmatch(known):
            return known
        if os.path.lexists(file):
            log.warning("%s is damaged, so a new W&B run is started; it was renamed to %s.", file, set_aside(file).name)
        file.parent.mkdir(parents=True, exist_ok=True)
        given = os.environ.get("WANDB_RUN_ID", "")  # by the agent of a W&B sweep
        write_text(file, given if RUN_ID.fullmatch(given) else secrets.token_hex(4))
        return file.read_text()

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any]) -> None:
        self._params.update(params)
        run = self.experiment
        self.calls.call(lambda: run.config.update(params, allow_val_change=True), None)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self._begin_row(self._step if step is None else step)
        self._row.update({name: value for name, value in metrics.items() if name != "epoch"})

    @rank_zero_only
    def log_samples(self, samples: list[Sample], step: int) -> None:
        self._begin_row(step)
        self._samples = self.calls.call(lambda: with_samples(self._samples, samples), None)
        self._row[SAMPLES] = self._samples

    @rank_zero_only
    def log_score(self, score: dict[str, float], step: int) -> None:
        """Add the score to the summary, by which W&B's tables sort runs."""
        run = self.experiment
        self.calls.call(lambda: run.summary.update(score), None)

    @rank_zero_only
    def log_model(self, folder: Path) -> None:
        if self.logs_model:
            run = self.experiment
            self.calls.call(lambda: log_artifact(run, folder), None, UPLOAD_SECONDS)

    @rank_zero_only
    def log_page(self, name: str, file: Path, step: int) -> None:
        """Log an HTML page, such as one with maps of attention and losses."""
        self.log_metrics({name: self.calls.call(lambda: wandb.Html(str(file)), None)}, step)

    @rank_zero_only
    def save(self) -> None:
        """Do nothing: rows are logged when they are complete."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._log_row()
        run = self._experiment
        if run is None or run.disabled:
            return
        self._experiment = _no_run()  # later calls must not start a second run
        code = 0 if status in ("success", "finished") else 1
        folder = Path(run.dir).parent
        if not self.calls.call(lambda: _finish(run, code), True, self._finish_seconds() + 10):
            log.warning("W&B has not received the whole run in time; `wandb sync %s` uploads it.", folder)
        elif run.offline:
            self.calls.call(lambda: self.merge_offline_runs(self._params), False, UPLOAD_SECONDS)

    def merge_offline_runs(self, params: dict[str, Any]) -> bool:
        """Merge the offline runs of the run directory; return whether there was anything to merge.

        Args:
            params: the configuration of the run.
        """
        is_finished = read_report(self.run_dir).get("status") in FINISHED
        model = self.run_dir / "hf" if self.logs_model and is_finished else None
        return merge(self.run_dir, lambda folder: self._init("offline", folder), params, model, 0 if is_finished else 1)

    def _begin_row(self, step: int) -> None:
        if step != self._step:
            self._log_row()
            self._step = step

    def _log_row(self) -> None:
        row, self._row = self._row, {}
        best = self._best.add(row)
        if row and self._step > self._logged_step:
            run = self.experiment
            run.log(row)
            if best and self._is_continued:
                self.calls.call(lambda: run.summary.update(best), None)

    def _log_missing_rows(self) -> None:
        """Log rows until the checkpoint that the server lacks, such as the last before a crash, and their summary."""
        summary: dict[str, Any] = {}
        rows: list[Any] = self.calls.call(lambda: list(merged_rows(self.run_dir)), [])
        for step, values, samples in rows:
            if step > self.labels.completed:
                break
            summary |= {STEP: step, **values, **self._best.add(values)}
            if step > self._logged_step:
                self.log_metrics(values, step)
                self.log_samples(samples, step)
        if summary and self._logged_step <= self.labels.completed:  # else the server's is newer
            run = self.experiment
            self.calls.call(lambda: run.summary.update(summary), None)

    def _start(self) -> Any:
        """Return a new W&B run; None if W&B is disabled."""
        logging.raiseExceptions = False  # no tracebacks of W&B's log file on a full disk
        mode = chosen_mode(self.mode)
        is_shown = self.labels.is_requested or mode == "online"
        self.calls.is_quiet = not is_shown
        if mode == "disabled":
            log.log(logging.INFO if is_shown else logging.DEBUG, "W&B: disabled")
            return None
        try:
            run = self._start_online() if mode == "online" else self._init(mode, self.run_dir)
        except Exception as error:
            if mode == "offline":
                raise
            log.warning("W&B is unreachable (%s); this run is logged offline.", first_line(error))
            mode = "offline"
            run = self._init(mode, self.run_dir)
        offline = f"offline in {self.run_dir / 'wandb'}; `wandb sync` uploads it"
        log.log(logging.INFO if is_shown else logging.DEBUG, "W&B: %s", offline if mode == "offline" else run.url)
        if mode == "online":
            use_inputs(run, self.labels)
        return self._prepared(run)

    def _start_online(self) -> Any:
        """Return the online run; one of which the server has rows after the checkpoint is rewound if possible."""
        numbers, run = RowNumbers(self.run_dir), None
        last = numbers.last_until(self.labels.completed)
        with _attempt(self.run_dir):
            if last is not None and self._rows_of_server() > last + 1:
                run = self._rewound(last)
            is_rewound = run is not None
            run = run or self._init("online", self.run_dir)
            numbers.begin(run.starting_step)
        self._numbers, self._is_continued = numbers, is_rewound or run.resumed
        self._logged_step = max(numbers.newest, int(run.summary.get(STEP, 0)) if run.resumed else 0)
        return run

    def _rewound(self, last: int) -> Any:
        """Return the online run after its rewind to a row; None if the server does not allow that."""
        try:
            with _attempt(self.run_dir):
                return self._init("online", self.run_dir, f"{self.run_id()}?_step={last}")
        except Exception as error:
            if not self.calls.is_quiet:
                log.info("W&B did not rewind this run, so repeated steps are omitted: %s", first_line(error))
            return None

    def _rows_of_server(self) -> int:
        """Return the number of the run's rows that the server has; the folder of the request is temporary."""
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            run = self._init("online", Path(folder), is_read_only=True)
            rows = int(run.starting_step) if run.resumed else 0
            run.finish()
            end_service()  # which still has the run id
        return rows

    def _init(self, mode: Any, folder: Path, resume_from: str | None = None, is_read_only: bool = False) -> Any:
        labels = self.labels
        settings = wandb.Settings(silent=True, init_timeout=INIT_SECONDS, console="off")
        settings.finish_timeout = self._finish_seconds()
        settings.finish_timeout_raises = True
        settings.x_update_finish_state = not is_read_only
        is_new = not (self.run_dir / "wandb" / "run-id").exists() and "WANDB_RUN_ID" not in os.environ
        run = wandb.init(
            entity=self.entity or None,
            project=os.environ.get("WANDB_PROJECT", self._project),
            name=os.environ.get("WANDB_NAME", labels.name),
            group=self.group or labels.group or None,
            job_type=self.job_type or labels.job_type or None,
            tags=list(dict.fromkeys([*labels.tags, *self.tags])) or None,
            notes=self.notes or None,
            id=self.run_id(),
            dir=folder,
            resume=None if is_new or resume_from else "allow",  # which requests the state of the run from the server
            resume_from=resume_from,
            mode=mode,
            reinit="default" if wandb.run is None or wandb.run.disabled else "create_new",
            settings=settings,
        )
        SERVICE_EXIT.register()
        return run

    def _finish_seconds(self) -> int:
        return UPLOAD_SECONDS if self.logs_model else FINISH_SECONDS

    def _prepared(self, run: Any) -> Any:
        """Define the metrics of a new run, and bound the methods that other callbacks call."""
        define_metrics(run)
        for name in METHODS + FILE_METHODS:
            seconds = UPLOAD_SECONDS if name in FILE_METHODS else CALL_SECONDS
            setattr(run, name, self._bounded(getattr(run, name), seconds))
        log_row = run.log

        def log_numbered(data: dict[str, Any], *given: Any) -> None:
            if self._numbers is not None and self._step > self._numbers.newest:
                self._numbers.add(self._step, max(run.step, run.starting_step))  # 0 before its first row
            log_row({STEP: self._step, **data}, *given)

        def log_at_step(data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
            self.calls.call(lambda: log_numbered(data, step, commit), None)

        run.log = log_at_step
        if wandb.run is run:
            wandb.log = log_at_step
        return run

    def _bounded(self, method: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        """Return the method as one that returns None when it fails or takes too long."""
        return lambda *given, **named: self.calls.call(lambda: method(*given, **named), None, seconds)


@contextmanager
def _attempt(run_dir: Path) -> Iterator[None]:
    """Start an online run; if that fails, end W&B's service, which has its id, and delete its folder without a row."""
    earlier = set(run_dir.glob(ONLINE_FOLDERS))
    try:
        yield
    except Exception:
        end_service()
        for folder in set(run_dir.glob(ONLINE_FOLDERS)) - earlier:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _no_run() -> Any:
    """Return a W&B run whose methods do nothing; it starts no service and reads no settings, which may be invalid."""
    settings = wandb.Settings(mode="disabled", run_id="none", run_name="none", project="none", entity="none")
    return init_noop_run(settings=settings, config={})


def _finish(run: Any, exit_code: int) -> bool:
    """Finish the run; return whether its server or, offline, its folder has all of it."""
    folder = Path(run.dir).parent
    try:
        run.finish(exit_code=exit_code)
        if run.offline:
            wait_until_written(folder)
    except TimeoutError:
        end_service()
        return False
    return True
