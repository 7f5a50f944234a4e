"""Baselines without a model: copies, the most frequent label, and a word table learnt from pairs."""

import random
import sys

from gpt2lab.evaluation.text_baselines import COMMONEST, COPY, FIRST_WORDS, WORD_TABLE, text_baselines, word_table

DICTIONARY = {"open": "öffne", "close": "schließe", "file": "Datei", "folder": "Ordner", "the": "die", "no": "kein"}


def translations(count: int) -> list[tuple[str, str]]:
    """Sentences of three words, in another order on the other side."""
    draws = random.Random(0)
    pairs = []
    for _ in range(count):
        words = draws.sample(sorted(DICTIONARY), 3)
        theirs = [DICTIONARY[word] for word in words]
        draws.shuffle(theirs)
        pairs.append((" ".join(words), " ".join(theirs)))
    return pairs


def test_a_word_table_finds_the_dictionary_behind_the_pairs() -> None:
    answer = text_baselines(["chrf", "bleu"], translations(200))[WORD_TABLE]
    assert answer("open the file: %s!") == "öffne die Datei: %s!"
    assert answer("unknown folder") == "unknown Ordner"


def test_the_lead_is_as_long_as_targets_are() -> None:
    answers = text_baselines(["rougeL"], [("a b c d", "x y"), ("e f g", "x y z"), ("h", "x y")])
    assert sorted(answers) == [COPY, FIRST_WORDS]
    assert answers[FIRST_WORDS]("one two three") == "one two"
    assert answers[COPY](" one two three\n") == "one two three"


def test_label_baseline_is_the_most_frequent_label() -> None:
    answers = text_baselines(["accuracy", "f1"], [("good", "yes"), ("bad", "no"), ("fine", "yes ")])
    assert list(answers) == [COMMONEST]
    assert answers[COMMONEST]("awful") == "yes"


def test_later_rounds_resolve_words_next_to_common_ones() -> None:
    # One round cannot separate "Datei" from "die" next to "file"; in the next, "the" explains "die" everywhere.
    pairs = [("the file", "die Datei")] * 3 + [("the folder", "die Mappe")] * 2
    assert word_table(pairs) == {"the": "die", "file": "Datei", "folder": "Mappe"}


def test_word_table_shows_progress_in_a_terminal(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    word_table(translations(50))
    shown = capsys.readouterr().err
    assert "word table, round 1 of 5" in shown
    assert "50/50" in shown
