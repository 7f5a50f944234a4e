"""Report: write report.json and report.html at the end of a run, however it ends; the page also from its start on."""

import logging
import shlex
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning
from lightning import Trainer

from callbacks.best import find_best
from callbacks.checkpoint import is_complete
from callbacks.ending import run_status, stop_reason
from callbacks.health import Health
from callbacks.throughput import find_throughput
from gpt2lab.data.batch import Batch
from gpt2lab.errors import ExportError
from gpt2lab.metric_names import TOKENS
from gpt2lab.reports.model_card import FILE, STEPS, read_step, write_card
from gpt2lab.reports.report_html import RUNNING
from gpt2lab.reports.run_report import build_report, write_page, write_report
from gpt2lab.storage.metrics_csv import STEP, read_metrics
from gpt2lab.storage.model_folder import parameter_count, read_shape
from gpt2lab.storage.report_json import FINISHED, read_report
from gpt2lab.system import device

PAGE_SECONDS = 20.0  # between two pages of a run that trains
LATE = 4  # times the longest time between two pages so far, after which the next one is late
FIRST_LATE = 600.0  # seconds, for the second page, before which a run may compile

log = logging.getLogger(__name__)


class Report(lightning.Callback):
    """Write the report; placed after Checkpoint, whose verification of the export is part of the run.

    Attributes:
        facts: facts from outside the training: task, model, data, command.
        card: facts of the model card that are known before training.
        score: score of the exported weights (final_score.py); empty without one.
        content: the written report.
    """

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self.card: Mapping[str, Any] = {}
        self.score: dict[str, Any] = {}
        self.content: dict[str, Any] = {}
        self._earlier_seconds = 0.0
        self._resumed: list[int] = []  # steps
        self._start = self._page_due = self._page_end = time.monotonic()
        self._longest_gap = 0.0  # seconds between two pages
        self._has_trained = False

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds(), "resumed": self._resumed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._earlier_seconds = state_dict["seconds"]
        self._resumed = list(state_dict["resumed"])

    def setup(self, trainer: Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self._start = time.monotonic()
        pl_module.elapsed = self._seconds

    def on_train_start(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        self._has_trained = True
        if trainer.global_step:
            self._resumed.append(trainer.global_step)
        if trainer.is_global_zero:
            self._write_running_page(trainer, pl_module, FIRST_LATE)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._rewrite_page(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._rewrite_page(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        self._rewrite_page(trainer, pl_module)

    def _rewrite_page(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        """Rewrite the page of a run that trains, at most every PAGE_SECONDS and in at most 2 % of the time."""
        if self._has_trained and trainer.is_global_zero and time.monotonic() >= self._page_due:
            self._longest_gap = max(self._longest_gap, time.monotonic() - self._page_end)
            self._write_running_page(trainer, pl_module, LATE * max(self._longest_gap, PAGE_SECONDS))

    def _write_running_page(self, trainer: Trainer, pl_module: lightning.LightningModule, patience: float) -> None:
        start = time.monotonic()
        report = self._report(trainer, pl_module, RUNNING)
        with suppress(OSError):  # a full disk ends the run where it loses something
            write_page(trainer.default_root_dir, report, patience)
        end = self._page_end = time.monotonic()
        self._page_due = end + max(PAGE_SECONDS, 50 * (end - start))

    def on_fit_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        if run_status(trainer) in FINISHED and trainer.global_step < trainer.max_steps:
            log.info("Training ended early, after step %d of %d.", trainer.global_step, trainer.max_steps)
        self.write(trainer, pl_module, run_status(trainer))
        if trainer.is_global_zero and run_status(trainer) in FINISHED:
            self._write_card(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: lightning.LightningModule, exception: BaseException) -> None:
        """Write the status of training; a failure after the last state was saved does not change it."""
        is_later = isinstance(exception, Exception | SystemExit) and not isinstance(exception, ExportError)
        if is_later and is_complete(trainer):
            self.write(trainer, pl_module, run_status(trainer))
            return
        if not self._has_trained and read_report(trainer.default_root_dir):
            return  # a resumed run failed before training: keep the earlier report
        stopped = stop_reason(trainer) != "" or isinstance(exception, SystemExit)  # a signal outside training
        error = "" if stopped else f"{type(exception).__name__}: {exception}"
        self.write(trainer, pl_module, "stopped" if stopped else "failed", error)

    def write(self, trainer: Trainer, pl_module: lightning.LightningModule, status: str, error: str = "") -> None:
        """Write both files, on the first rank."""
        if not trainer.is_global_zero:
            return
        self.content = self._report(trainer, pl_module, status, error)
        try:
            write_report(trainer.default_root_dir, self.content)
        except OSError as reason:
            if not error:  # otherwise the error that ended the run is printed
                fix = f"python train.py resume={shlex.quote(trainer.default_root_dir)} writes it"
                log.warning("The report of this run could not be written: %s. %s.", reason, fix)

    def _write_card(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the model card of `hf/` again, with the scores of its step and their errors."""
        folder = Path(trainer.default_root_dir) / "hf"
        step = read_step(folder)
        if step is None:
            return
        rows = [row for row in read_metrics(trainer.default_root_dir) if int(row[STEP]) == step]
        measured = {name: float(value) for row in rows for name, value in row.items() if value and name != STEP}
        seen = {"tokens_seen": int(measured[TOKENS])} if TOKENS in measured else {}
        facts = {"title": folder.parent.name, **self.content, **self.card, **seen, STEPS: step, "metrics": measured}
        facts["parameters"] = parameter_count(read_shape(folder))  # adapters are merged
        try:
            write_card(folder, facts, pl_module.tokenizer)
        except OSError as reason:
            log.warning("The model card %s could not be completed: %s.", folder / FILE, reason)

    def _report(
        self, trainer: Trainer, pl_module: lightning.LightningModule, status: str, error: str = ""
    ) -> dict[str, Any]:
        best, throughput = find_best(trainer), find_throughput(trainer)
        phases = throughput.seconds_by_phase() if throughput is not None else {}
        facts = {
            **self.facts,
            "parameters": sum(p.numel() for p in pl_module.backbone.parameters()) if pl_module.is_built else None,
            "steps": trainer.global_step,
            "tokens_seen": pl_module.tokens_seen,
            "seconds": round(self._seconds(), 2),
            "seconds_by_phase": {name: round(value, 2) for name, value in phases.items()},
            # not pl_module's: at the end of the fit Lightning has moved it to the CPU
            "peak_memory_bytes": device.peak_memory_bytes(trainer.strategy.root_device),
            "stopped_by": stop_reason(trainer),
            "events": self._events(trainer),
            "watched_metric": pl_module.watched_metric,
            "best_step": best.step,
            "export": "best" if best.exports_best else "last",
            "val_tokens": pl_module.settings.val_tokens,
            "metric_errors": best.errors,
            **self.score,
            **pl_module.facts_for_report(),
        }
        exported_step = best.step if best.exports_best else None
        return build_report(trainer.default_root_dir, status, facts, error, exported_step)

    def _events(self, trainer: Trainer) -> list[tuple[int, str]]:
        """Return (step, what happened) of resumes and loss spikes."""
        health = [callback for callback in trainer.callbacks if isinstance(callback, Health)]
        spikes = [(step, f"loss spike, {loss:.3g}") for callback in health for step, loss in callback.spikes]
        return sorted([*((step, "resumed") for step in self._resumed), *spikes])

    def _seconds(self) -> float:
        return self._earlier_seconds + time.monotonic() - self._start
