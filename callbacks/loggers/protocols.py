"""Logger protocols: optional methods of loggers, checked instead of their classes, whose libraries load slowly."""

from dataclasses import dataclass
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


@runtime_checkable
class TakesPages(Protocol):
    """Logger of HTML pages: W&B."""

    def log_page(self, name: str, file: Path, step: int) -> None:
        """Log a page of this step."""


@dataclass(frozen=True)
class RunLabels:
    """Names by which a logger lists a run.

    Attributes:
        data: name and hash of the prepared data.
        models: folders of the models that the run starts from: its teacher, and its initial weights.
        completed: steps of the checkpoint that the run is resumed from.
        is_requested: whether the user chose or configured the logger, so that its messages are of interest.
    """

    name: str
    job_type: str = ""
    group: str = ""
    tags: tuple[str, ...] = ()
    data: tuple[str, str] | None = None
    models: tuple[str, ...] = ()
    completed: int = 0
    is_requested: bool = True


@runtime_checkable
class TakesLabels(Protocol):
    """Logger that lists runs by labels: W&B."""

    def set_labels(self, labels: RunLabels) -> None:
        """Set the labels, before anything is logged."""
