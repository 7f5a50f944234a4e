"""Text baselines: predictions without a model, which a trained model must beat.

copy         the source, unchanged
first words  the first words of the source, as many as the median training target has: lead baseline of summarization
commonest    the most frequent training target: the majority label
word table   word-by-word translation of the source, in its word order
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from statistics import median

from gpt2lab.evaluation.text_metrics import mostly_han
from gpt2lab.system.terminal import track

COPY, FIRST_WORDS, COMMONEST, WORD_TABLE = "copy", "first words", "commonest", "word table"
MOST_PAIRS = 100_000  # training pairs of a baseline
MOST_WORDS = 40  # words of a text that the word table is trained on
ROUNDS = 5  # of expectation maximization
WORD = re.compile(r"\w+(?:['’]\w+)?")

Baseline = Callable[[str], str]  # source → prediction


def text_baselines(metrics: Sequence[str], training: Iterable[tuple[str, str]]) -> dict[str, Baseline]:
    """Return the baselines of a task by name.

    Args:
        metrics: metrics of the task (text_metrics.py); bleu and chrf indicate translation, accuracy and f1 labels.
        training: (source, target) texts; the first 100,000 are read.
    """
    pairs = list(islice(training, MOST_PAIRS))
    if {"accuracy", "f1"} & set(metrics):
        commonest = Counter(target.strip() for _, target in pairs).most_common(1)[0][0]
        return {COMMONEST: lambda source: commonest}
    count = max(round(median(len(target.split()) for _, target in pairs)), 1)
    baselines: dict[str, Baseline] = {COPY: str.strip, FIRST_WORDS: lambda source: " ".join(source.split()[:count])}
    has_spaces = not mostly_han([target for _, target in pairs[:1000]])  # between words
    if {"bleu", "chrf"} & set(metrics) and has_spaces:
        table = word_table(pairs)
        baselines[WORD_TABLE] = lambda source: WORD.sub(lambda word: table.get(word[0], word[0]), source).strip()
    return baselines


def word_table(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the most probable target word of each source word.

    Source: Brown et al. 1993, The Mathematics of Statistical Machine Translation, IBM model 1, without the empty word.
    """
    texts = [(WORD.findall(source)[:MOST_WORDS], WORD.findall(target)[:MOST_WORDS]) for source, target in pairs]
    probabilities: dict[str, dict[str, float]] = {}
    for number in range(ROUNDS):
        counts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for words, target_words in track(texts, f"word table, round {number + 1} of {ROUNDS}", len(texts), "pairs"):
            for target_word in target_words:
                # In the first round all translations are equally probable.
                shares = [probabilities[word].get(target_word, 0.0) if probabilities else 1.0 for word in words]
                whole = sum(shares)
                for word, share in zip(words, shares, strict=True):
                    if share:
                        counts[word][target_word] += share / whole
        probabilities = {word: _normalize(found) for word, found in counts.items()}
    return {word: max(found, key=found.__getitem__) for word, found in probabilities.items()}


def _normalize(counts: dict[str, float]) -> dict[str, float]:
    whole = sum(counts.values())
    return {word: count / whole for word, count in counts.items()}
