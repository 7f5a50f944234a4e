"""Scores of generated text with the interval in which they would lie on other texts of the kind: the bootstrap.

Shapes: N texts.

Texts are drawn again with replacement, 1,000 times, and scored: the middle 95 % of the scores are the interval. It
tells how far the choice of texts matters, not the seed of the training. For BLEU and chrF sacreBLEU does it.

Source: Koehn 2004, Statistical Significance Tests for Machine Translation Evaluation.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpt2lab.text_metrics import macro_f1, mean_of, sacrebleu_metric, values_of_texts

DRAWS = 1000
OF_SACREBLEU = ("bleu", "chrf")
NORMAL_95 = 1.959964  # half the width of a normal variable's middle 95 %, in standard deviations


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
    names: Iterable[str], predictions: list[str], references: list[str], seed: int = 0
) -> dict[str, TextScore]:
    """Score `predictions` (N texts) against one reference each, by metric name (gpt2lab/text_metrics.py).

    Raises:
        ValueError: no text, or not as many predictions as references.
    """
    names = list(names)
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} references: give as many, at least one."
        )
    values = values_of_texts(names, predictions, references)
    draws = np.random.default_rng(seed)
    scores = {}
    for name in names:
        if name in OF_SACREBLEU:
            scores[name] = _of_sacrebleu(name, predictions, references)
        elif name in values:
            scores[name] = _of_means(values[name], draws)
        else:
            again = _drawn(len(references), draws)
            drawn = [macro_f1([predictions[n] for n in one], [references[n] for n in one]) for one in again]
            scores[name] = _interval(
                macro_f1(predictions, references), np.array(drawn) if len(references) > 1 else None
            )
    return scores


def _of_means(values: list[float], draws: np.random.Generator) -> TextScore:
    if not values:
        return TextScore(None, None, None, None)
    drawn = np.array(values)[_drawn(len(values), draws)].mean(1) if len(values) > 1 else None
    return _interval(mean_of(values), drawn)


def _drawn(count: int, draws: np.random.Generator) -> NDArray[np.int64]:
    """(DRAWS, count) places of texts."""
    return draws.integers(0, count, (DRAWS, count))


def _interval(value: float, drawn: NDArray[np.float64] | None) -> TextScore:
    if drawn is None:
        return TextScore(value, None, None, None)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return TextScore(value, float(drawn.std()), float(low), float(high))


def _of_sacrebleu(name: str, predictions: list[str], references: list[str]) -> TextScore:
    metric = sacrebleu_metric(name, references)
    several = len(references) > 1
    found = metric.corpus_score(predictions, [references], n_bootstrap=DRAWS if several else 1)
    if not several:
        return TextScore(found.score, None, None, None, str(metric.get_signature()))
    middle, half = float(found._mean), float(found._ci)
    signature = str(metric.get_signature())
    return TextScore(found.score, half / NORMAL_95, middle - half, middle + half, signature)
