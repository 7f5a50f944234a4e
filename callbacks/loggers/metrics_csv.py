"""MetricsCsv: logger that writes metrics.csv in the run directory; every run has it."""

from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from gpt2lab.storage.metrics_csv import MetricsFile


class MetricsCsv(Logger):
    """Logger with a row per optimizer step, see gpt2lab/storage/metrics_csv.py."""

    def __init__(self, run_dir: str) -> None:
        super().__init__()
        self.file = MetricsFile(run_dir)

    @property
    def name(self) -> str:
        """Folder below the run directory where a ModelCheckpoint without `dirpath` writes `checkpoints/`."""
        return "lightning"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any]) -> None:
        """Do nothing: they are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.file.write(step or 0, {name: value for name, value in metrics.items() if name != "epoch"})
