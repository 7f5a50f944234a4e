"""Scores of generated text against references, all from 0 to 100, as papers print them.

rouge1, rouge2, rougeL  F1 of unigrams, bigrams, longest common subsequence, averaged over texts; no stemming
bleu                    corpus BLEU, tokenized as sacreBLEU's 13a, or zh where the references are Chinese or Japanese
chrf                    corpus chrF2: character 6-grams, no words (sacreBLEU's default)
exact                   share of predictions that equal their reference, white space at the ends aside
accuracy, f1            of labels in words: exact, and the mean over the references' labels of each label's F1 (macro)
compiles                share of predictions that are the body of a Python function
placeholders            share of the texts whose reference has any (%s, %2$ld, %(name)d, {name}) that have the same
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gpt2lab.settings import TEXT_METRICS

PLACEHOLDER = re.compile(
    r"%(?:\d+\$|\(\w+\))?[-#0+']*(?:\d+|\*)?(?:\.(?:\d+|\*))?(?:hh?|ll?|[jzLtq])?[a-zA-Z%]"  # of printf, but for "% d"
    r"|\{\w*(?:![rsa])?(?::[^{}]*)?\}"  # of str.format
)


def text_metrics(names: Iterable[str], predictions: list[str], references: list[str]) -> dict[str, float]:
    """Score `predictions` (N texts) against one reference each; NaN where no text has what the metric looks at.

    torchmetrics takes seconds to import: that happens here, not when the module is imported.

    Raises:
        ValueError: an unknown name, no text, or not as many predictions as references.
    """
    names = list(names)
    unknown = sorted(set(names) - set(TEXT_METRICS))
    if unknown:
        raise ValueError(f"unknown text metric {unknown[0]!r}; allowed: {', '.join(TEXT_METRICS)}.")
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} references: give as many, at least one."
        )
    values = values_of_texts(names, predictions, references)
    of_corpus = {"bleu": bleu, "chrf": chrf, "f1": macro_f1}
    return {
        name: mean_of(values[name]) if name in values else of_corpus[name](predictions, references) for name in names
    }


def values_of_texts(
    names: Iterable[str], predictions: list[str], references: list[str]
) -> dict[str, list[float | None]]:
    """0 to 100 of each text, for those metrics that are a mean over texts; None where a text has no placeholder."""
    one_each: dict[str, Callable[[str, str], float | None]] = {
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
        if name in one_each:
            values[name] = [one_each[name](ours, theirs) for ours, theirs in pairs]
    return values


def mean_of(values: Sequence[float | None]) -> float:
    """NaN where there is nothing to score, as where no reference has a placeholder."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def _rouge(names: tuple[str, ...], pairs: list[tuple[str, str]]) -> dict[str, list[float | None]]:
    from torchmetrics.functional.text import rouge_score

    each = [rouge_score(ours, theirs, rouge_keys=names) for ours, theirs in pairs]
    return {name: [100 * scores[f"{name}_fmeasure"].item() for scores in each] for name in names}


def bleu(predictions: list[str], references: list[str]) -> float:
    """Corpus BLEU."""
    return sacrebleu_metric("bleu", references).corpus_score(predictions, [references]).score


def chrf(predictions: list[str], references: list[str]) -> float:
    """Corpus chrF2."""
    # Not torchmetrics' (1.9): it drops the references of predictions that share nothing with them, which flatters.
    return sacrebleu_metric("chrf", references).corpus_score(predictions, [references]).score


def sacrebleu_metric(name: str, references: list[str]) -> Any:
    """sacreBLEU's object for bleu or chrf."""
    from sacrebleu.metrics import BLEU, CHRF

    # 13a splits at spaces, which these languages do not write: a whole sentence would be one word.
    return CHRF() if name == "chrf" else BLEU(tokenize="zh" if mostly_han(references) else "13a")


def mostly_han(texts: list[str]) -> bool:
    """Whether most letters are Chinese or Japanese."""
    letters = [character for text in texts for character in text if character.isalpha()]
    han = sum("\u3040" <= character <= "\u30ff" or "\u3400" <= character <= "\u9fff" for character in letters)
    return 2 * han > len(letters)


def _exact(ours: str, theirs: str) -> float:
    return 100.0 * (ours.strip() == theirs.strip())


def macro_f1(predictions: list[str], references: list[str]) -> float:
    """Mean over the references' labels of each label's F1."""
    given, right = Counter(text.strip() for text in predictions), Counter(text.strip() for text in references)
    hits = Counter(
        theirs.strip() for ours, theirs in zip(predictions, references, strict=True) if ours.strip() == theirs.strip()
    )
    return 100 * sum(2 * hits[label] / (given[label] + count) for label, count in right.items()) / len(right)


def _is_body(text: str) -> bool:
    """Whether the text, indented as it is, can stand under `def` or `async def`."""
    for head in ("def f():", "async def f():"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes and such
                compile(f"{head}\n{text}\n", "prediction", "exec")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        return True
    return False


def _placeholders(ours: str, theirs: str) -> float | None:
    wanted = sorted(PLACEHOLDER.findall(theirs))
    return 100.0 * (sorted(PLACEHOLDER.findall(ours)) == wanted) if wanted else None
