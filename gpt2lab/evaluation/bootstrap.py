"""Bootstrap confidence intervals for the scores of generated text.

Shapes: N texts.

Documents are resampled with replacement 1,000 times, each with all its texts. The middle 95 % of the resampled scores
are the interval. It covers the choice of documents, not the seed of the training.

Source: Koehn 2004, Statistical Significance Tests for Machine Translation Evaluation; Field & Welsh 2007, Bootstrapping
Clustered Data.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gpt2lab.evaluation.text_metrics import macro_f1, mean_or_nan, per_text_scores, sacrebleu_metric

RESAMPLES = 1000
SACREBLEU_METRICS = ("bleu", "chrf")


@dataclass(frozen=True)
class TextScore:
    """Score from 0 to 100 with its error.

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
        ValueError: no text, or the numbers of predictions and references differ.
    """
    names = list(names)
    values = per_text_scores(names, predictions, references)
    documents = _texts_of_documents(groups if groups is not None else range(len(references)))
    generator = np.random.default_rng(seed)
    scores = {}
    for name in names:
        if name in SACREBLEU_METRICS:
            scores[name] = _sacrebleu_score(name, predictions, references, documents, generator)
        elif name in values:
            scores[name] = _mean_score(values[name], documents, generator)
        else:
            resampled = [
                macro_f1([predictions[n] for n in texts], [references[n] for n in texts])
                for texts in _resample(documents, generator)
            ]
            scores[name] = _interval(macro_f1(predictions, references), resampled)
    return scores


def _mean_score(
    values: Sequence[float | None], documents: list[NDArray[np.int64]], generator: np.random.Generator
) -> TextScore:
    """Score of a metric that is a mean over texts."""
    known = np.array([np.nan if value is None else value for value in values])
    if np.isnan(known).all():
        return TextScore(None, None, None, None)
    resampled = [known[texts] for texts in _resample(documents, generator)]
    return _interval(mean_or_nan(values), [float(np.nanmean(one)) for one in resampled if not np.isnan(one).all()])


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


def _interval(value: float, resampled: list[float]) -> TextScore:
    if not resampled:
        return TextScore(value, None, None, None)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return TextScore(value, float(np.std(resampled)), float(low), float(high))


def _sacrebleu_score(
    name: str,
    predictions: list[str],
    references: list[str],
    documents: list[NDArray[np.int64]],
    generator: np.random.Generator,
) -> TextScore:
    """Score of a corpus metric; resamples are scored from the sums of each text's statistics."""
    metric = sacrebleu_metric(name, references)
    statistics = metric._extract_corpus_statistics(predictions, [references])  # per text
    resampled = [
        metric._aggregate_and_compute([statistics[n] for n in texts]).score for texts in _resample(documents, generator)
    ]
    score = _interval(metric._aggregate_and_compute(statistics).score, resampled)
    return replace(score, signature=str(metric.get_signature()))
