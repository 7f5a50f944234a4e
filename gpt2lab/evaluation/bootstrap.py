"""Scores of generated text with the interval in which they would lie on other texts of the kind: the bootstrap.

Shapes: N texts.

Documents are drawn again with replacement, 1,000 times, each with all its texts, and scored: the middle 95 % of the
scores are the interval. It shows how far the choice of documents matters, not the seed of the training.

Source: Koehn 2004, Statistical Significance Tests for Machine Translation Evaluation; Field & Welsh 2007, Bootstrapping
Clustered Data.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpt2lab.evaluation.text_metrics import macro_f1, mean_of, sacrebleu_metric, values_of_texts

DRAWS = 1000
OF_SACREBLEU = ("bleu", "chrf")


@dataclass(frozen=True)
class TextScore:
    """From 0 to 100.

    Attributes:
        value: None where no text has what the metric looks at: no reference has a placeholder.
        standard_error, low, high: of the figure and of its 95 % interval; None where there is one text only.
        signature: how sacreBLEU computed it; empty for others.
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
    """Score `predictions` (N texts) against one reference each, by metric name (gpt2lab/evaluation/text_metrics.py).

    Args:
        groups: (N,) the document group of each text; None: every text is a document.

    Raises:
        ValueError: no text, or not as many predictions as references.
    """
    names = list(names)
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} references: give as many, at least one."
        )
    values = values_of_texts(names, predictions, references)
    texts = _texts_of_documents(groups if groups is not None else range(len(references)))
    draws = np.random.default_rng(seed)
    scores = {}
    for name in names:
        if name in OF_SACREBLEU:
            scores[name] = _of_sacrebleu(name, predictions, references, texts, draws)
        elif name in values:
            scores[name] = _of_means(values[name], texts, draws)
        else:
            again = _drawn(texts, draws)
            drawn = [macro_f1([predictions[n] for n in one], [references[n] for n in one]) for one in again]
            scores[name] = _interval(macro_f1(predictions, references), np.array(drawn) if drawn else None)
    return scores


def _of_means(values: Sequence[float | None], texts: list[NDArray[np.int64]], draws: np.random.Generator) -> TextScore:
    known = np.array([np.nan if value is None else value for value in values])
    if np.isnan(known).all():
        return TextScore(None, None, None, None)
    drawn = [known[one] for one in _drawn(texts, draws)]
    means = [np.nanmean(one) for one in drawn if not np.isnan(one).all()]
    return _interval(mean_of(values), np.array(means) if means else None)


def _texts_of_documents(groups: Sequence[int]) -> list[NDArray[np.int64]]:
    """The texts of each document, by number; one document's are kept together as far as there are several documents."""
    numbers = np.asarray(groups)
    texts = [np.flatnonzero(numbers == group) for group in dict.fromkeys(numbers.tolist())]
    return texts if len(texts) > 1 else [np.array([number]) for number in range(len(numbers))]


def _drawn(texts: list[NDArray[np.int64]], draws: np.random.Generator) -> list[NDArray[np.int64]]:
    """DRAWS times the texts of as many documents, drawn with replacement; nothing for a single one."""
    if len(texts) < 2:
        return []
    numbers = draws.integers(0, len(texts), (DRAWS, len(texts)))
    return [np.concatenate([texts[number] for number in one]) for one in numbers]


def _interval(value: float, drawn: NDArray[np.float64] | None) -> TextScore:
    if drawn is None:
        return TextScore(value, None, None, None)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return TextScore(value, float(drawn.std()), float(low), float(high))


def _of_sacrebleu(
    name: str,
    predictions: list[str],
    references: list[str],
    texts: list[NDArray[np.int64]],
    draws: np.random.Generator,
) -> TextScore:
    metric = sacrebleu_metric(name, references)
    statistics = metric._extract_corpus_statistics(predictions, [references])  # of each text; scores come from sums
    drawn = [metric._aggregate_and_compute([statistics[n] for n in one]).score for one in _drawn(texts, draws)]
    found = _interval(metric._aggregate_and_compute(statistics).score, np.array(drawn) if drawn else None)
    return TextScore(found.value, found.standard_error, found.low, found.high, str(metric.get_signature()))
