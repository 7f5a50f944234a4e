"""TensorBoard: metrics, configuration, sample texts and the view of the task under `<run_dir>/tensorboard`.

After an error with its files a warning is logged once, and training continues without them.
"""

import json
import logging
import threading
from collections.abc import Callable
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread

from gpt2lab.reports.dashboard_views import STEP, VIEWS, View
from gpt2lab.reports.samples_jsonl import Sample

log = logging.getLogger(__name__)


class TensorBoard(TensorBoardLogger):
    """Lightning's TensorBoardLogger in the run directory, without failures of training."""

    def __init__(self, run_dir: str) -> None:
        super().__init__(save_dir=run_dir, name="tensorboard", version="", default_hp_metric=False)
        self._failed = False

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any], *_unused: Any) -> None:
        text = f"```json\n{json.dumps(params, indent=2, default=str)}\n```"
        self._guarded(lambda: self.experiment.add_text("config", text))
        layout = next((_layout(view) for view in VIEWS if view.task and view.task == params.get("task")), None)
        if layout is not None:
            self._guarded(lambda: self.experiment.add_custom_scalars(layout))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._guarded(lambda: super(TensorBoard, self).log_metrics(metrics, step))

    @rank_zero_only
    def log_score(self, score: dict[str, float], step: int) -> None:
        self.log_metrics(score, step)

    @rank_zero_only
    def log_samples(self, samples: list[Sample], step: int) -> None:
        text = "\n\n".join(f"**{s.method}**\n```\n{s.prompt}{s.written}\n```" for s in samples)
        self._guarded(lambda: self.experiment.add_text("samples", text, step))

    @rank_zero_only
    def save(self) -> None:
        self._guarded(lambda: super(TensorBoard, self).save())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._guarded(lambda: super(TensorBoard, self).finalize(status))

    def _guarded(self, action: Callable[[], Any]) -> None:
        if self._failed:
            return
        threading.excepthook = _not_of_writers
        try:
            action()
        except OSError as error:
            self._failed = True
            log.warning("TensorBoard is off for the rest of this run: %s", error)


def _layout(view: View) -> dict[str, dict[str, list[Any]]]:
    """Return a view for TensorBoard's tab Custom Scalars, whose horizontal axis is the step."""
    return {
        section: {panel.question: ["Multiline", list(panel.metrics)] for panel in panels if panel.x == STEP}
        for section, panels in view.sections.items()
    }


def _not_of_writers(failure: threading.ExceptHookArgs) -> None:
    """Suppress tracebacks of the thread that writes event files; its errors are raised again by the next write."""
    if not isinstance(failure.thread, _AsyncWriterThread):
        threading.__excepthook__(failure)
