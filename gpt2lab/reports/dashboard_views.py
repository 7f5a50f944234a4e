"""Dashboard views: the panels that answer the questions about each kind of run, for W&B and for TensorBoard."""

from dataclasses import dataclass
from typing import Literal

from gpt2lab import metric_names as names

MOST_PANELS = 12  # of a view, which is read at a glance
STEP = "step"


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        question: its title, the question that it answers.
        metrics: names in metric_names.py.
        x: metric of the horizontal axis of a line chart.
        kind: line: over training; best: best value of each run; search: values of the configuration against the metric.
    """

    question: str
    metrics: tuple[str, ...]
    x: str = STEP
    kind: Literal["line", "best", "search"] = "line"


@dataclass(frozen=True)
class View:
    """Panels for one kind of run, by section.

    Attributes:
        task: the runs that it shows; empty: all.
    """

    name: str
    task: str
    sections: dict[str, tuple[Panel, ...]]

    @property
    def panels(self) -> list[Panel]:
        """All panels, in the order of the sections."""
        return [panel for panels in self.sections.values() for panel in panels]


def _text(*metrics: str) -> tuple[str, ...]:
    return tuple(f"{names.VALIDATION_PREFIX}{metric}" for metric in metrics)


LOSS = (
    Panel("Does the validation loss still fall?", (names.VAL_LOSS,)),
    Panel("Does the model overfit?", (names.TRAIN_LOSS, names.VAL_LOSS)),
)
STABILITY = (
    Panel("Are the gradients stable?", (names.GRAD_NORM,)),
    Panel("Which learning rate is used?", (names.LEARNING_RATE,)),
)
COST = (
    Panel("How fast is training?", (names.TOKENS_PER_SECOND,)),
    Panel("How much of the device is used?", (names.MFU,)),
    Panel("How much memory is used?", (names.MEMORY_GB,)),
)
PRETRAIN = View(
    "Pretraining",
    "pretrain",
    {
        "Quality": (
            *LOSS,
            Panel("How many bits does a byte of text need?", (names.VAL_BITS_PER_BYTE,)),
            Panel("Between how many tokens does the model choose?", (names.VAL_PERPLEXITY,)),
            Panel("Which run is best at equal tokens?", (names.VAL_LOSS,), x=names.TOKENS),
            Panel("Which run is best at equal time?", (names.VAL_LOSS,), x=names.SECONDS),
        ),
        "Stability": STABILITY,
        "Cost": COST,
    },
)
DISTILL = View(
    "Distillation",
    "distill",
    {
        "Quality": (
            *LOSS,
            Panel("Does the distillation loss still fall?", (names.TRAIN_OBJECTIVE,)),
            Panel("How much of the gap to the teacher is closed?", (names.DISTILL_GAP_CLOSED,)),
        ),
        "Agreement with the teacher": (
            Panel("How far is the student from the teacher?", (names.DISTILL_KL, names.DISTILL_REVERSE_KL)),
            Panel(
                "How often do both predict the same token?",
                (names.DISTILL_TOP1_AGREEMENT, names.DISTILL_TOP5_AGREEMENT),
            ),
            Panel("How many drafts of the student does the teacher accept?", (names.DISTILL_ACCEPTANCE,)),
            Panel("Is the student calibrated?", (names.DISTILL_ECE, names.DISTILL_TEACHER_ECE)),
            Panel(
                "Is the student over-confident?",
                (names.DISTILL_ENTROPY_STUDENT, names.DISTILL_ENTROPY_TEACHER),
            ),
            Panel("How far is a teacher with another tokenizer?", (names.DISTILL_ULD,)),
        ),
        "Cost": COST[:2],
    },
)
FINETUNE = View(
    "Fine-tuning",
    "finetune",
    {
        "Generated text": (
            Panel("Do summaries contain the words of the references?", _text("rouge1", "rouge2", "rougeL")),
            Panel("Are translations like the references?", _text("bleu", "chrf")),
            Panel("Are labels right?", _text("accuracy", "f1", "exact")),
            Panel("Is the generated code valid?", _text("compiles")),
            Panel("Are placeholders kept?", _text("placeholders")),
        ),
        "Loss": LOSS,
        "Stability": STABILITY,
        "Cost": COST,
    },
)
SWEEP = View(
    "Sweeps",
    "",
    {
        "Choice": (
            Panel("Which run has the lowest validation loss?", (names.VAL_LOSS,), kind="best"),
            Panel("Which values lead to a low validation loss?", (names.VAL_LOSS,), kind="search"),
            Panel("Which student closes most of the gap?", (names.DISTILL_GAP_CLOSED,), kind="best"),
        ),
        "Course": (
            Panel("Which run leads at each step?", (names.VAL_LOSS,)),
            Panel("Which run is best at equal time?", (names.VAL_LOSS,), x=names.SECONDS),
            Panel("Does a run diverge?", (names.TRAIN_LOSS, names.GRAD_NORM)),
        ),
        "Cost": COST,
    },
)
VIEWS = (PRETRAIN, DISTILL, FINETUNE, SWEEP)


def metrics_logged() -> set[str]:
    """Return the names of all metrics that runs of this project log."""
    return {STEP, *names.logged()}
