"""Scores of generated text as the program computes them, without their errors."""

import math
from collections.abc import Iterable

from gpt2lab.evaluation.bootstrap import text_scores


def text_metrics(names: Iterable[str], predictions: list[str], references: list[str]) -> dict[str, float]:
    """Return the scores by name; NaN where a metric applies to no text."""
    scores = text_scores(names, predictions, references)
    return {name: math.nan if score.value is None else score.value for name, score in scores.items()}
