"""Logger kinds: what loggers may take besides metrics; asked for instead of loggers, whose libraries load slowly."""

from pathlib import Path
from typing import Protocol, runtime_checkable

from gpt2lab.reports.samples_jsonl import Sample


@runtime_checkable
class TakesSamples(Protocol):
    """W&B and TensorBoard."""

    def log_samples(self, samples: list[Sample], step: int) -> None:
        """Show texts that the model has written at this step."""


@runtime_checkable
class TakesModels(Protocol):
    """W&B."""

    def log_model(self, folder: Path) -> None:
        """Keep the exported model that lies in the folder."""
