"""13-gram overlap: the share of the validation text's 13-grams that also occur in the training text.

A 13-gram is 13 successive words of one document, in lower case and without punctuation, as in the overlap analysis of
GPT-3 (Brown et al. 2020, appendix C). A character of Chinese or Japanese counts as a word.
"""

import functools
import logging
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from datamodules.documents import Document
from datamodules.token_preparation import TRAIN, VAL

log = logging.getLogger(__name__)

SAMPLE = 2**21  # distinct 13-grams of a side that are kept
BLOCK = 2**17  # characters that are hashed in one call
MERGED = 2**18  # 13-grams that are merged in one call
BASE, MIXER = 0x9E3779B97F4A7C15, np.uint64(0xBF58476D1CE4E5B9)  # odd
SEPARATOR, LETTER, WORD = 0, 1, 2  # kinds of characters; one of the last kind is a word of its own
IDEOGRAPHS = ((0x3040, 0x3100), (0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00))
OTHER_PLANES = 2**16  # stands for all characters from here on

Hashes = NDArray[np.uint64]


class NgramOverlap:
    """Counts both sides of a split in one pass, in any order, with memory independent of the amount of text.

    If a side has more than `sample` distinct 13-grams, only those with the smallest hashes are kept, the same on both
    sides. The share is then an estimate from a random sample that does not depend on the run.
    """

    def __init__(self, sample: int = SAMPLE) -> None:
        self._sample = sample
        self._limit = np.uint64(2**64 - 1)  # largest hash that is kept
        self._sides = {side: _Side(counts_occurrences=side == VAL) for side in (TRAIN, VAL)}

    def documents(self, found: Iterable[tuple[str, Document]]) -> Iterator[tuple[str, Document]]:
        """Count documents with their sides while they are passed on."""
        for side, document in found:
            self.add(side, document.text, document.continues)
            yield side, document

    def pairs(self, side: str, found: Iterable[tuple[str, str, str]]) -> Iterator[tuple[str, str, str]]:
        """Count (source, target, file) of one side while they are passed on."""
        for source, target, file in found:
            self.add(side, f"{source}\n{target}")
            yield source, target, file

    def add(self, side: str, text: str, continues: bool = False) -> None:
        """Count the text of a document, or of a piece that continues the document before it."""
        counts = self._sides[side]
        for start in range(0, len(text), BLOCK):
            part = text[start : start + BLOCK].lower()
            counts.number += not (start or continues)
            counts.texts += [part, "\n"]
            counts.lengths.append((counts.number, len(part) + 1))
            counts.characters += len(part)
            if counts.characters >= BLOCK:
                self._hash(counts)

    def share(self) -> float | None:
        """Return the share of occurrences in the validation text; None if it has no 13-gram."""
        for counts in self._sides.values():
            self._hash(counts)
            self._merge(counts)
        train, val = self._sides[TRAIN], self._sides[VAL]
        is_kept = val.found <= self._limit
        occurrences = val.occurrences[is_kept]
        is_known = np.isin(val.found[is_kept], train.found, assume_unique=True)
        return float(occurrences[is_known].sum() / occurrences.sum()) if len(occurrences) else None

    def _hash(self, counts: "_Side") -> None:
        words, starts = _hash_words("".join(counts.texts))
        numbers, lengths = np.array(counts.lengths, np.int64).reshape(-1, 2).T
        document = numbers[np.searchsorted(np.cumsum(lengths), starts, "right")]
        counts.texts, counts.lengths, counts.characters = [], [], 0
        grams = _hash_13_grams(words)
        counts.pending.append(grams[(document[12:] == document[:-12]) & (grams <= self._limit)])
        if sum(map(len, counts.pending)) >= MERGED:
            self._merge(counts)

    def _merge(self, counts: "_Side") -> None:
        counts.merge()
        while len(counts.found) > self._sample:
            self._limit //= np.uint64(2)
            counts.keep(self._limit)


class _Side:
    """13-grams of one side: sorted distinct hashes, of validation text with occurrences, and what is not merged yet."""

    def __init__(self, counts_occurrences: bool) -> None:
        self.found: Hashes = np.empty(0, np.uint64)
        self.occurrences = np.empty(0, np.int64)
        self.pending: list[Hashes] = []
        self.texts: list[str] = []
        self.lengths: list[tuple[int, int]] = []  # (number of the document, characters)
        self.characters = self.number = 0
        self._counts_occurrences = counts_occurrences

    def merge(self) -> None:
        """Add the pending hashes to the distinct ones."""
        hashes = np.concatenate([self.found, *self.pending])
        order = np.argsort(hashes, kind="stable") if self._counts_occurrences else None
        hashes = np.sort(hashes) if order is None else hashes[order]
        is_first = np.ones(len(hashes), bool)
        is_first[1:] = hashes[1:] != hashes[:-1]
        if order is not None and len(hashes):
            times = np.concatenate([self.occurrences, np.ones(len(hashes) - len(self.found), np.int64)])[order]
            self.occurrences = np.add.reduceat(times, np.flatnonzero(is_first))
        self.found, self.pending = hashes[is_first], []

    def keep(self, limit: np.uint64) -> None:
        """Drop the hashes above a limit."""
        is_kept = self.found <= limit
        self.found = self.found[is_kept]
        if self._counts_occurrences:
            self.occurrences = self.occurrences[is_kept]


def log_share(name: str, share: float | None) -> None:
    """Log the share of prepared data."""
    if share is not None:
        log.info(
            "data=%s: %.1f %% of the 13-grams of the validation text occur in the training text", name, 100 * share
        )


def _hash_words(text: str) -> tuple[Hashes, NDArray[np.int64]]:
    """Return the hash of each word and the position of its first character: both (words,).

    The hash is a polynomial of the characters, a difference of two prefix sums divided by the power of its position.
    """
    characters = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)
    kinds = _kinds()[np.minimum(characters, OTHER_PLANES)]
    padded = np.pad(kinds, 1)  # a SEPARATOR on both sides
    edges = (padded[1:] != padded[:-1]) | ((padded[1:] == WORD) & (padded[:-1] == WORD))
    positions = np.flatnonzero(edges)
    starts = positions[padded[1:][positions] != SEPARATOR]
    ends = positions[np.searchsorted(positions, starts, "right")]
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(characters * _powers(BASE, len(characters)))])
    inverse = _powers(pow(BASE, -1, 2**64), len(characters))
    return _mixed((sums[ends] - sums[starts]) * inverse[starts]), starts


def _hash_13_grams(words: Hashes) -> Hashes:
    """Return the hash of each 13 successive words: (n,) → (n - 12,), by polynomials that double their length."""
    one, two, four = (np.uint64(pow(BASE, length, 2**64)) for length in (1, 2, 4))
    if len(words) < 13:
        return words[:0]
    pairs = words[:-1] * one + words[1:]
    fours = pairs[:-2] * two + pairs[2:]
    eights = fours[:-4] * four + fours[4:]
    twelves = eights[:-4] * four + fours[8:]
    return _mixed(twelves[:-1] * one + words[12:])


def _mixed(hashes: Hashes) -> Hashes:
    """Return hashes whose bits all depend on all bits."""
    hashes = (hashes ^ (hashes >> np.uint64(32))) * MIXER
    return hashes ^ (hashes >> np.uint64(29))


@functools.cache
def _all_powers(base: int, length: int) -> Hashes:
    return np.cumprod(np.concatenate([np.ones(1, np.uint64), np.full(length - 1, base, np.uint64)]))


def _powers(base: int, length: int) -> Hashes:
    """Return base⁰, base¹, … modulo 2⁶⁴: (length,)."""
    return _all_powers(base, 1 << max(length - 1, 0).bit_length())[:length]


@functools.cache
def _kinds() -> NDArray[np.uint8]:
    """Return the kind of each character; a letter is a letter or digit of any script, or `_`."""
    kinds = [LETTER if chr(code).isalnum() or code == ord("_") else SEPARATOR for code in range(OTHER_PLANES)]
    table = np.array([*kinds, WORD], np.uint8)
    for start, stop in IDEOGRAPHS:
        table[start:stop] = np.where(table[start:stop] == LETTER, WORD, table[start:stop])
    return table
