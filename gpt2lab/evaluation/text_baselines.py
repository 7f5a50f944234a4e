"""Answers without a model, which a model that has learned a task must beat: copies of the source, and a word table.

copy         the source as it is
first words  as many of its words as half of the training targets have: the lead of a summary
commonest    the training target that occurs most often: the majority label
word table   each word of the source in the place it stands, by the target word that best explains it
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from statistics import median

from tqdm import tqdm

from gpt2lab.evaluation.text_metrics import mostly_han

COPY, FIRST_WORDS, COMMONEST, WORD_TABLE = "copy", "first words", "commonest", "word table"
MOST_PAIRS = 100_000  # that a baseline learns from
MOST_WORDS = 40  # of a text that a word table learns from
ROUNDS = 5  # of expectation maximisation
WORD = re.compile(r"\w+(?:['’]\w+)?")

Answer = Callable[[str], str]


def text_baselines(metrics: Sequence[str], training: Iterable[tuple[str, str]]) -> dict[str, Answer]:
    """Baselines that suit a task, by name.

    Args:
        metrics: of the task (text_metrics.py); bleu and chrf mean a translation, accuracy and f1 labels.
        training: (source, target) texts; the first 100,000 are read.
    """
    pairs = list(islice(training, MOST_PAIRS))
    if {"accuracy", "f1"} & set(metrics):
        commonest = Counter(target.strip() for _, target in pairs).most_common(1)[0][0]
        return {COMMONEST: lambda source: commonest}
    count = max(round(median(len(target.split()) for _, target in pairs)), 1)
    answers: dict[str, Answer] = {COPY: str.strip, FIRST_WORDS: lambda source: " ".join(source.split()[:count])}
    marks_words = not mostly_han([target for _, target in pairs[:1000]])  # as Chinese and Japanese do not
    if {"bleu", "chrf"} & set(metrics) and marks_words:
        table = word_table(pairs)
        answers[WORD_TABLE] = lambda source: WORD.sub(lambda word: table.get(word[0], word[0]), source).strip()
    return answers


def word_table(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The likeliest target word of each source word.

    Source: Brown et al. 1993, The Mathematics of Statistical Machine Translation, model 1, without the empty word.
    """
    texts = [(WORD.findall(source)[:MOST_WORDS], WORD.findall(target)[:MOST_WORDS]) for source, target in pairs]
    likely: dict[str, dict[str, float]] = {}
    for number in range(ROUNDS):
        counts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for words, theirs in tqdm(texts, f"word table, round {number + 1} of {ROUNDS}", unit=" pairs", disable=None):
            for their in theirs:
                # In the first round every word explains every other equally well.
                shares = [likely[word].get(their, 0.0) if likely else 1.0 for word in words]
                whole = sum(shares)
                for word, share in zip(words, shares, strict=True):
                    if share:
                        counts[word][their] += share / whole
        likely = {word: _shares(found) for word, found in counts.items()}
    return {word: max(found, key=lambda their: found[their]) for word, found in likely.items()}


def _shares(counts: dict[str, float]) -> dict[str, float]:
    whole = sum(counts.values())
    return {word: count / whole for word, count in counts.items()}
