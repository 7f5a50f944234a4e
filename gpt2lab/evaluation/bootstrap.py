"""Bootstrap confidence intervals for the scores of generated text.

Shapes: N texts.

Documents are resampled with replacement 1,000 times, each with all its texts. The middle 95 % of the resampled scores
are the interval. It covers the choice of documents, not the seed of the training.

Source: Koehn 2004, Statistical Significance Tests for Machine Translation Evaluation; Field & Welsh 2007, Bootstrapping
Clustered Data.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpt2lab.evaluation.text_metrics import macro_f1, mean_or_nan, per_text_scores, sacrebleu_metric

RESAMPLES = 1000
SACREBLEU_METRICS = ("bleu", "chrf")


@dataclass(frozen=True)
class TextScore:
    """Score from 0 to 100, or difference of two, with its error.

    Attributes:
        value: None where the metric applies to no text, as where no reference has a placeholder.
        standard_error, low, high: standard error and ends of the 95 % interval; None for a single text.
        signature: sacreBLEU's signature; empty for other metrics.
    """

    value: float | None
    standard_error: float | None
    low: float | None
    high: float | None
    signature: str = ""


@dataclass(frozen=True)
class ResampledScore:
    """Score of all texts and of every resample; the resamples are empty for a single document.

    The resamples depend on the metric names, references, seed and groups only, so that scores of other texts with equal
    ones are paired.
    """

    value: float | None
    resamples: list[float]
    signature: str = ""

    @property
    def interval(self) -> TextScore:
        """The score with its standard error and 95 % interval."""
        if self.value is None or not self.resamples:
            return TextScore(self.value, None, None, None, self.signature)
        low, high = np.percentile(self.resamples, [2.5, 97.5])
        return TextScore(self.value, float(np.std(self.resamples)), float(low), float(high), self.signature)


def text_scores(
    names: Iterable[str],
    predictions: list[str],
    references: list[str],
    seed: int = 0,
    groups: Sequence[int] | None = None,
) -> dict[str, TextScore]:
    """Score `predictions` (N texts) against one reference each; return scores by metric name (text_metrics.py).

    Args:
        groups: (N,) document group of each text; None: every text is a document.

    Raises:
        ValueError: an unknown name, no text, or the numbers of predictions and references differ.
    """
    return intervals(resampled_scores(names, predictions, references, seed, groups))


def intervals(scores: Mapping[str, ResampledScore]) -> dict[str, TextScore]:
    """Return the scores with their errors, by metric name."""
    return {name: score.interval for name, score in scores.items()}


def text_differences(ours: Mapping[str, ResampledScore], others: Mapping[str, ResampledScore]) -> dict[str, TextScore]:
    """Return the scores of `ours` minus those of `others` by metric name, paired by document.

    Both are scored on the same resampled documents, so that their difficulty cancels.

    Args:
        ours, others: `resampled_scores` of equal names, references, seed and groups.
    """
    differences = {}
    for name, score in ours.items():
        other = others[name]
        value = None if score.value is None or other.value is None else score.value - other.value
        apart = [mine - its for mine, its in zip(score.resamples, other.resamples, strict=True)]
        differences[name] = ResampledScore(value, apart).interval
    return differences


def resampled_scores(
    names: Iterable[str],
    predictions: list[str],
    references: list[str],
    seed: int = 0,
    groups: Sequence[int] | None = None,
) -> dict[str, ResampledScore]:
    """Score the texts and all resamples; arguments and errors as in `text_scores`."""
    names = list(names)
    values = per_text_scores(names, predictions, references)
    documents = _texts_of_documents(groups if groups is not None else range(len(references)))
    generator = np.random.default_rng(seed)
    scores: dict[str, ResampledScore] = {}
    for name in names:
        if name in SACREBLEU_METRICS:
            scores[name] = _sacrebleu_scores(name, predictions, references, documents, generator)
        elif name in values:
            scores[name] = _mean_scores(values[name], documents, generator)
        else:
            resampled = [
                macro_f1([predictions[n] for n in texts], [references[n] for n in texts])
                for texts in _resample(documents, generator)
            ]
            scores[name] = ResampledScore(macro_f1(predictions, references), resampled)
    return scores


def _mean_scores(
    values: Sequence[float | None], documents: list[NDArray[np.int64]], generator: np.random.Generator
) -> ResampledScore:
    """Score a metric that is a mean over texts."""
    known = np.array([np.nan if value is None else value for value in values])
    if np.isnan(known).all():
        return ResampledScore(None, [])
    resampled = [known[texts] for texts in _resample(documents, generator)]
    return ResampledScore(mean_or_nan(values), [float(np.nanmean(one)) for one in resampled if not np.isnan(one).all()])


def _texts_of_documents(groups: Sequence[int]) -> list[NDArray[np.int64]]:
    """Return the indices of each document's texts; of a single document, each text by itself."""
    numbers = np.asarray(groups)
    texts = [np.flatnonzero(numbers == group) for group in dict.fromkeys(numbers.tolist())]
    return texts if len(texts) > 1 else [np.array([number]) for number in range(len(numbers))]


def _resample(documents: list[NDArray[np.int64]], generator: np.random.Generator) -> list[NDArray[np.int64]]:
    """Return the texts of RESAMPLES resamples with replacement; an empty list for a single document."""
    if len(documents) < 2:
        return []
    numbers = generator.integers(0, len(documents), (RESAMPLES, len(documents)))
    return [np.concatenate([documents[number] for number in one]) for one in numbers]


def _sacrebleu_scores(
    name: str,
    predictions: list[str],
    references: list[str],
    documents: list[NDArray[np.int64]],
    generator: np.random.Generator,
) -> ResampledScore:
    """Score a corpus metric; resamples are scored from the sums of each text's statistics."""
    metric = sacrebleu_metric(name, references)
    statistics = metric._extract_corpus_statistics(predictions, [references])  # per text
    resampled = [
        metric._aggregate_and_compute([statistics[n] for n in texts]).score for texts in _resample(documents, generator)
    ]
    return ResampledScore(metric._aggregate_and_compute(statistics).score, resampled, str(metric.get_signature()))
