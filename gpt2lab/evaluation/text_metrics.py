"""Text metrics: scores of generated text against references, from 0 to 100 as in papers.

rouge1, rouge2, rougeL  F1 of unigrams, bigrams, longest common subsequence, averaged over texts; no stemming
bleu                    corpus BLEU, tokenized as sacreBLEU's 13a, or zh where the references are Chinese or Japanese
chrf                    corpus chrF2: character 6-grams, no words (sacreBLEU's default)
exact                   share of predictions that equal their reference, white space at the ends aside
accuracy, f1            classification with labels as text: exact match, and macro-F1 over the references' labels
compiles                share of predictions that compile as the body of a Python function
placeholders            share with the reference's placeholders (%s, %2$ld, %(name)d, {name}), where it has any
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gpt2lab.settings import TEXT_METRICS

PLACEHOLDER = re.compile(
    r"%(?:\d+\$|\(\w+\))?[-#0+']*(?:\d+|\*)?(?:\.(?:\d+|\*))?(?:hh?|ll?|[jzLtq])?[a-zA-Z%]"  # printf, except "% d"
    r"|\{\w*(?:![rsa])?(?::[^{}]*)?\}"  # str.format
)


def per_text_scores(
    names: Iterable[str], predictions: list[str], references: list[str]
) -> dict[str, list[float | None]]:
    """Score each text, for the metrics that are a mean over texts; None where a metric does not apply to a text.

    torchmetrics, which takes seconds to import, is imported for ROUGE only.

    Raises:
        ValueError: an unknown name, no text, or the numbers of predictions and references differ.
    """
    names = list(names)
    unknown = sorted(set(names) - set(TEXT_METRICS))
    if unknown:
        raise ValueError(f"unknown text metric {unknown[0]!r}; allowed: {', '.join(TEXT_METRICS)}.")
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} references: give the same number, at least one."
        )
    text_metric: dict[str, Callable[[str, str], float | None]] = {
        "exact": _exact,
        "accuracy": _exact,
        "compiles": lambda ours, _: 100.0 * _is_body(ours),
        "placeholders": _placeholders,
        **TEXT_METRICS.added,
    }
    values: dict[str, list[float | None]] = {}
    pairs = list(zip(predictions, references, strict=True))
    rouge_names = tuple(name for name in names if name.startswith("rouge"))
    if rouge_names:
        values |= _rouge(rouge_names, pairs)
    for name in names:
        if name in text_metric:
            values[name] = [text_metric[name](ours, theirs) for ours, theirs in pairs]
    return values


def text_score(name: str, prediction: str, reference: str) -> float | None:
    """Score one text; None where the metric does not apply to it."""
    values = per_text_scores([name], [prediction], [reference])
    return values[name][0] if name in values else corpus_score(name, [prediction], [reference])


def mean_or_nan(values: Sequence[float | None]) -> float:
    """Return the mean of the known values; NaN if there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def _rouge(names: tuple[str, ...], pairs: list[tuple[str, str]]) -> dict[str, list[float | None]]:
    from torchmetrics.functional.text import rouge_score

    each = [rouge_score(ours, theirs, rouge_keys=names) for ours, theirs in pairs]
    return {name: [100 * scores[f"{name}_fmeasure"].item() for scores in each] for name in names}


def corpus_score(name: str, predictions: list[str], references: list[str]) -> float:
    """Compute bleu, chrf or f1, which are no means over texts."""
    if name == "f1":
        return macro_f1(predictions, references)
    return sacrebleu_metric(name, references).corpus_score(predictions, [references]).score


def sacrebleu_metric(name: str, references: list[str]) -> Any:
    """Return sacreBLEU's metric object for bleu or chrf.

    torchmetrics 1.9 drops references that share nothing with the prediction, so its chrF scores are too high.
    """
    from sacrebleu.metrics import BLEU, CHRF

    # 13a splits at spaces, which Chinese and Japanese do not use: a sentence would be one word.
    return CHRF() if name == "chrf" else BLEU(tokenize="zh" if mostly_han(references) else "13a")


def mostly_han(texts: list[str]) -> bool:
    """Return whether most letters are Chinese or Japanese."""
    letters = [character for text in texts for character in text if character.isalpha()]
    han = sum("\u3040" <= character <= "\u30ff" or "\u3400" <= character <= "\u9fff" for character in letters)
    return 2 * han > len(letters)


def _exact(ours: str, theirs: str) -> float:
    return 100.0 * (ours.strip() == theirs.strip())


def macro_f1(predictions: list[str], references: list[str]) -> float:
    """Compute macro-F1: the mean F1 over the references' labels."""
    predicted, expected = Counter(text.strip() for text in predictions), Counter(text.strip() for text in references)
    hits = Counter(
        theirs.strip() for ours, theirs in zip(predictions, references, strict=True) if ours.strip() == theirs.strip()
    )
    return 100 * sum(2 * hits[label] / (predicted[label] + count) for label, count in expected.items()) / len(expected)


def _is_body(text: str) -> bool:
    """Return whether the text compiles as the indented body of `def` or `async def`."""
    for head in ("def f():", "async def f():"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # such as those for invalid escapes
                compile(f"{head}\n{text}\n", "prediction", "exec")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        return True
    return False


def _placeholders(ours: str, theirs: str) -> float | None:
    expected = sorted(PLACEHOLDER.findall(theirs))
    return 100.0 * (sorted(PLACEHOLDER.findall(ours)) == expected) if expected else None
