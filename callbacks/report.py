"""Report: report.json and report.html at the end of a run, however it ends."""

import time
from dataclasses import replace
from typing import Any

import lightning
from lightning import Trainer

from callbacks.interrupt import Interrupt
from callbacks.pruning import Pruning
from gpt2lab import device
from gpt2lab.document_losses import write_document_losses
from gpt2lab.run_report import build_report, read_report, write_report


class Report(lightning.Callback):
    """Stands after the checkpoint, whose proof of the export belongs to the run. `content` is what was written.

    Args:
        facts: what the launcher knows: task, model, data, command.
    """

    def __init__(self, run_dir: str, facts: dict[str, Any]) -> None:
        self.run_dir = run_dir
        self.facts = facts
        self.content: dict[str, Any] = {}
        self._earlier_seconds = 0.0
        self._start = time.monotonic()
        self._has_trained = False

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._earlier_seconds = state_dict["seconds"]

    def setup(self, trainer: Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self._start = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        self._has_trained = True

    def on_validation_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        losses = pl_module.validation_documents
        if trainer.is_global_zero and losses is not None and not trainer.sanity_checking:
            known = self.facts.get("data", {}).get("hash", "")
            write_document_losses(self.run_dir, replace(losses, data=known))

    def on_fit_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        ended = "pruned" if _is_pruned(trainer) else "stopped"
        self._write(trainer, pl_module, "finished" if trainer.global_step >= trainer.max_steps else ended)

    def on_exception(self, trainer: Trainer, pl_module: lightning.LightningModule, exception: BaseException) -> None:
        if not self._has_trained and read_report(self.run_dir):
            return  # a run taken up again failed before it went on: what is known of it stays
        stopped = _stop_reason(trainer) != "" or isinstance(exception, SystemExit)  # a signal outside training
        error = "" if stopped else f"{type(exception).__name__}: {exception}"
        self._write(trainer, pl_module, "stopped" if stopped else "failed", error)

    def _write(self, trainer: Trainer, pl_module: lightning.LightningModule, status: str, error: str = "") -> None:
        if not trainer.is_global_zero:
            return
        facts = {
            **self.facts,
            "parameters": sum(p.numel() for p in pl_module.backbone.parameters()) if pl_module.is_built else None,
            "steps": trainer.global_step,
            "tokens_seen": pl_module.tokens_seen,
            "seconds": round(self._seconds(), 2),
            # not pl_module's: at the end of the fit Lightning has moved it to the CPU
            "peak_memory_bytes": device.peak_memory_bytes(trainer.strategy.root_device),
            "stopped_by": _stop_reason(trainer),
            "watched_metric": pl_module.watched_metric,
            **pl_module.facts_for_report(),
        }
        self.content = build_report(self.run_dir, status, facts, error)
        write_report(self.run_dir, self.content)

    def _seconds(self) -> float:
        return self._earlier_seconds + time.monotonic() - self._start


def _stop_reason(trainer: Trainer) -> str:
    return next((callback.reason for callback in trainer.callbacks if isinstance(callback, Interrupt)), "")


def _is_pruned(trainer: Trainer) -> bool:
    return any(callback.is_pruned for callback in trainer.callbacks if isinstance(callback, Pruning))
