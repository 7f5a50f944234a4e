"""Logger protocols: optional methods of loggers, checked instead of their classes, whose libraries load slowly."""

from pathlib import Path
from typing import Protocol, runtime_checkable

from gpt2lab.reports.samples_jsonl import Sample


@runtime_checkable
class TakesSamples(Protocol):
    """Logger of samples: W&B and TensorBoard."""

    def log_samples(self, samples: list[Sample], step: int) -> None:
        """Log texts generated at this step."""


@runtime_checkable
class TakesScores(Protocol):
    """Logger of the score of the exported model: W&B and TensorBoard."""

    def log_score(self, score: dict[str, float], step: int) -> None:
        """Log the score of the model in `hf/` after the last step."""


@runtime_checkable
class TakesModels(Protocol):
    """Logger of exported models: W&B."""

    def log_model(self, folder: Path) -> None:
        """Log the exported model in the folder."""
