"""Score rows: results of evaluate.py as one row of figures per model, for the terminal, CSV and plots."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpt2lab.metric_names import (
    DISTILL_ECE,
    DISTILL_ENTROPY_STUDENT,
    DISTILL_ENTROPY_TEACHER,
    DISTILL_LOWER,
    DISTILL_TEACHER_ECE,
    DISTILL_TEACHER_LOSS,
    DISTILLATION,
)

if TYPE_CHECKING:
    from gpt2lab.evaluation.bootstrap import TextScore
    from gpt2lab.evaluation.evaluation import Score
    from gpt2lab.evaluation.jackknife import DocumentDifference
    from launch.evaluate.score_checkpoints import Results, Scored

DUPLICATES = (DISTILL_TEACHER_LOSS, DISTILL_ECE, DISTILL_TEACHER_ECE)  # same as `loss` and `ece` of the two models

MINUS = "_minus_"  # between a figure and what is subtracted
INTERVAL = "_interval"  # suffix of the 95 % interval of a difference, which has its own line in tables
MEMORY = "decode_memory_gb_"  # prefix
COUNTS = ("tokens", "bytes")  # exact numbers, which are not plotted
NOT_JUDGED = (DISTILL_ENTROPY_STUDENT, DISTILL_ENTROPY_TEACHER)
LOWER = ("loss", "perplexity", "bits_per_byte", "ece", *DISTILL_LOWER)  # lower is better, also of their differences

# name: (label, explanation); metric_names.DISTILLATION has those that compare with a teacher
LABELS = {
    "loss": ("loss", "nats per target token"),
    "perplexity": ("perplexity", "exp(loss)"),
    "bits_per_byte": ("bits per byte", "of the text; comparable between tokenizers"),
    "top1": ("top-1 accuracy", "share of targets that are the top-1 prediction"),
    "top5": ("top-5 accuracy", "share of targets among the top-5 predictions"),
    "ece": ("calibration error", "expected calibration error (ECE), 15 bins"),
    "tokens": ("targets", "scored tokens"),
    "bytes": ("bytes", "bytes of text of the scored tokens"),
    "rouge1": ("ROUGE-1", "F1 of words, in percent"),
    "rouge2": ("ROUGE-2", "F1 of word bigrams"),
    "rougeL": ("ROUGE-L", "F1 of the longest common subsequence"),
    "bleu": ("BLEU", "sacreBLEU, of the corpus"),
    "chrf": ("chrF", "sacreBLEU chrF2, of the corpus"),
    "exact": ("exact match", "percent"),
    "accuracy": ("accuracy", "percent of the labels"),
    "f1": ("F1", "macro average over the labels, in percent"),
    "compiles": ("compiles", "percent that compile as the body of a Python function"),
    "placeholders": ("placeholders", "percent that keep all placeholders, of those with any"),
    "loss_minus_first": ("loss − the first's", "nats, paired by document"),
    "bits_per_byte_minus_first": ("bits per byte − the first's", "paired by document; tokenizers differ"),
    "loss_minus_teacher": ("loss − the teacher's", "nats, paired by document"),
    "loss_minus_baseline": ("loss − the baseline's", "nats, paired by document"),
    "speedup": ("implied speed-up", "of the teacher with this model as draft"),
    **{name: text for name, text in DISTILLATION.items() if name not in DUPLICATES},
}


def direction(name: str) -> str:
    """Return which direction of a figure is better, for an axis; empty for one that is not judged."""
    if name in NOT_JUDGED:
        return ""
    is_lower = name.partition("_minus_")[0] in LOWER or name.startswith(MEMORY)
    return "← better" if is_lower else "better →"


@dataclass(frozen=True)
class Figure:
    """A value with, if known, its standard error and 95 % interval.

    Attributes:
        low, high: bounds of the interval.
        signature: sacreBLEU signature.
    """

    value: float
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None
    signature: str = ""

    @property
    def bounds(self) -> tuple[float, float]:
        """Bounds of the 95 % interval; ± 1.96 standard errors if only these are known."""
        if self.low is not None and self.high is not None:
            return self.low, self.high
        half = 1.96 * (self.standard_error or 0.0)
        return self.value - half, self.value + half

    def __str__(self) -> str:
        if self.standard_error is None:
            return f"{self.value:,.0f}" if float(self.value).is_integer() else f"{self.value:.4f}"
        return f"{self.value:,.{self.decimals}f} ± {self.standard_error:,.{self.decimals}f}"

    @property
    def decimals(self) -> int:
        """Decimals that leave two significant digits of the standard error, also for value and interval."""
        return min(max(1 - math.floor(math.log10(self.standard_error)), 0), 6) if self.standard_error else 4


class Interval(Figure):
    """A figure that is printed as its 95 % interval."""

    def __str__(self) -> str:
        low, high = self.bounds
        return f"{low:.{self.decimals}f} … {high:.{self.decimals}f}"


@dataclass(frozen=True)
class Row:
    """Figures of a model, or of a trivial baseline."""

    name: str
    figures: dict[str, Figure]


def score_rows(results: "Results", teacher: str, baseline: str) -> list[Row]:
    """Return the rows of the checkpoints, then of teacher and baseline, then of trivial answers without a model.

    Args:
        teacher, baseline: sources as given; may be empty.
    """
    names = short_names([scored.source for scored in results.checkpoints])
    rows = [Row(name, _figures(scored)) for name, scored in zip(names, results.checkpoints, strict=True)]
    comparison = results.checkpoints[-1].comparison
    if comparison is not None:
        rows.append(Row(f"teacher {short_names([teacher])[0]}", _score_figures(comparison.teacher)))
        if comparison.baseline is not None:
            rows.append(Row(f"baseline {short_names([baseline])[0]}", _score_figures(comparison.baseline)))
    return rows + [Row(name, _text_figures(scores)) for name, scores in results.baselines.items()]


def with_interval(value: float, error: float | None, factor: float) -> Figure:
    """Return a figure with the 95 % interval value ± factor · error (gpt2lab/evaluation/jackknife.py)."""
    return (
        Figure(value, error) if error is None else Figure(value, error, value - factor * error, value + factor * error)
    )


def label(name: str) -> tuple[str, str]:
    """Return (label, explanation) of a figure."""
    if name.startswith("decode_tokens_per_second_"):
        batch = name.rpartition("_")[2]
        return f"tokens/s, batch {batch}", "greedy decoding"
    if name.startswith(MEMORY):
        return f"memory, batch {name.rpartition('_')[2]}", "GB of weights and decoding"
    if name.endswith(INTERVAL):
        return "95 % interval", "of this difference"
    if name not in LABELS and MINUS in name:
        metric, _, answer = name.partition(MINUS)
        return f"{label(metric)[0]} − {answer.replace('_', ' ')}", "paired by document"
    return LABELS.get(name, (name, "zero-shot"))


def short_names(sources: list[str]) -> list[str]:
    """Return the sources without their common parent folders."""
    parts = [source.rstrip("/").split("/") for source in sources]
    common = 0
    while all(len(one) > common + 1 and one[common] == parts[0][common] for one in parts):
        common += 1
    return ["/".join(one[common:]) for one in parts]


def _figures(scored: "Scored") -> dict[str, Figure]:
    found = _score_figures(scored.score)
    if scored.comparison is not None:
        compared, factor = scored.comparison, scored.score.interval_factor
        found |= {
            name: with_interval(compared.figures[name], compared.standard_errors.get(name), factor)
            for name in DISTILLATION
            if name in compared.figures and name not in DUPLICATES
        }
        speculation = compared.speculation
        found["speedup"] = with_interval(speculation.speedup, speculation.speedup_standard_error, factor)
    found |= {
        name: Figure(one.value, one.standard_error, one.low, one.high) for name, one in differences(scored).items()
    }
    found |= _text_figures(scored.texts)
    for answer, scores in scored.minus_answers.items():
        watched = dict(list(scores.items())[:1])
        found |= {f"{name}{MINUS}{answer.replace(' ', '_')}": one for name, one in _text_figures(watched).items()}
    for speed in scored.speeds:
        found[f"decode_tokens_per_second_{speed.batch}"] = Figure(speed.tokens_per_second, speed.standard_error)
        if speed.memory_bytes is not None and speed.memory_standard_error is not None:
            memory = Figure(speed.memory_bytes / 1e9, speed.memory_standard_error / 1e9)
            found[f"decode_memory_gb_{speed.batch}"] = memory
    return found | {name: Figure(*pair) for name, pair in scored.zero_shot.items()}


def differences(scored: "Scored") -> "dict[str, DocumentDifference]":
    """Return the differences of loss, or bits per byte, to the other models, by name."""
    others = {"first": scored.minus_first, "teacher": scored.minus_teacher, "baseline": scored.minus_baseline}
    names = {"nats": "loss", "bits per byte": "bits_per_byte"}
    return {f"{names[one.unit]}_minus_{other}": one for other, one in others.items() if one is not None}


def _score_figures(score: "Score") -> dict[str, Figure]:
    figures = {
        name: with_interval(value, score.standard_errors.get(name), score.interval_factor)
        for name, value in score.figures.items()
    }
    return {**figures, "tokens": Figure(score.tokens), "bytes": Figure(score.bytes)}


def _text_figures(scores: "dict[str, TextScore]") -> dict[str, Figure]:
    return {
        name: Figure(one.value, one.standard_error, one.low, one.high, one.signature)
        for name, one in scores.items()
        if one.value is not None
    }
