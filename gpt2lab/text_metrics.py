"""Scores of generated text against references, all from 0 to 100, as papers print them.

rouge1, rouge2, rougeL  F1 of unigrams, bigrams, longest common subsequence, averaged over texts; no stemming
bleu                    corpus BLEU, tokenized as sacreBLEU's 13a, or zh where the references are Chinese or Japanese
chrf                    corpus chrF2: character 6-grams, no words (sacreBLEU's default)
exact                   share of predictions that equal their reference, white space at the ends aside
accuracy, f1            of labels in words: exact, and the mean over the references' labels of each label's F1 (macro)
compiles                share of predictions that are the body of a Python function
placeholders            share of the texts whose reference has any (%s, %(name)d, {name}) that have the same
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable

TEXT_METRICS = ("rouge1", "rouge2", "rougeL", "bleu", "chrf", "exact", "accuracy", "f1", "compiles", "placeholders")
PLACEHOLDER = re.compile(r"%(?:\(\w+\))?[-#0 +]*\d*(?:\.\d+)?[a-zA-Z%]|\{\w*\}")  # of printf and of str.format


def text_metrics(names: Iterable[str], predictions: list[str], references: list[str]) -> dict[str, float]:
    """Score `predictions` (N texts) against one reference each.

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
    scores: dict[str, float] = {}
    rouge_names = tuple(name for name in names if name.startswith("rouge"))
    if rouge_names:
        scores |= _rouge(rouge_names, predictions, references)
    one_each: dict[str, Callable[[list[str], list[str]], float]] = {
        "bleu": _bleu,
        "chrf": _chrf,
        "exact": _exact,
        "accuracy": _exact,
        "f1": _macro_f1,
        "compiles": _compiles,
        "placeholders": _placeholders,
    }
    scores |= {name: one_each[name](predictions, references) for name in names if name in one_each}
    return {name: scores[name] for name in names}


def _rouge(names: tuple[str, ...], predictions: list[str], references: list[str]) -> dict[str, float]:
    from torchmetrics.functional.text import rouge_score

    scores = rouge_score(predictions, references, rouge_keys=names)
    return {name: 100 * scores[f"{name}_fmeasure"].item() for name in names}


def _bleu(predictions: list[str], references: list[str]) -> float:
    from sacrebleu.metrics import BLEU

    # 13a splits at spaces, which these languages do not write: a whole sentence would be one word.
    tokenize = "zh" if _mostly_han(references) else "13a"
    return BLEU(tokenize=tokenize).corpus_score(predictions, [references]).score


def _mostly_han(texts: list[str]) -> bool:
    letters = [character for text in texts for character in text if character.isalpha()]
    han = sum("\u3040" <= character <= "\u30ff" or "\u3400" <= character <= "\u9fff" for character in letters)
    return 2 * han > len(letters)


def _chrf(predictions: list[str], references: list[str]) -> float:
    # Not torchmetrics' (1.9): it drops the references of predictions that share nothing with them, which flatters.
    from sacrebleu.metrics import CHRF

    return CHRF().corpus_score(predictions, [references]).score


def _exact(predictions: list[str], references: list[str]) -> float:
    equal = sum(ours.strip() == theirs.strip() for ours, theirs in zip(predictions, references, strict=True))
    return 100 * equal / len(references)


def _macro_f1(predictions: list[str], references: list[str]) -> float:
    given, right = Counter(text.strip() for text in predictions), Counter(text.strip() for text in references)
    hits = Counter(
        theirs.strip() for ours, theirs in zip(predictions, references, strict=True) if ours.strip() == theirs.strip()
    )
    return 100 * sum(2 * hits[label] / (given[label] + count) for label, count in right.items()) / len(right)


def _compiles(predictions: list[str], references: list[str]) -> float:
    return 100 * sum(map(_is_body, predictions)) / len(predictions)


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


def _placeholders(predictions: list[str], references: list[str]) -> float:
    """100 where no reference has any."""
    wanted = [(ours, sorted(PLACEHOLDER.findall(theirs))) for ours, theirs in zip(predictions, references, strict=True)]
    kept = [sorted(PLACEHOLDER.findall(ours)) == theirs for ours, theirs in wanted if theirs]
    return 100 * sum(kept) / len(kept) if kept else 100.0
