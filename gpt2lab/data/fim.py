"""Fill in the middle (FIM): move a document's middle to its end, so that a causal model learns to fill gaps.

Source: Bavarian et al. 2022, arXiv 2207.14255. Split points lie between tokens, a share of the documents is left
unchanged, and half of the others have the suffix before the prefix (SPM).
"""

import numpy as np
from numpy.typing import NDArray

from gpt2lab.data.special_tokens import SpecialTokens
from gpt2lab.settings import ObjectiveSettings

MIN_TOKENS = 3  # of a document to be rearranged


def rearrange_documents(
    tokens: NDArray[np.int64], random: NDArray[np.float64], special: SpecialTokens, settings: ObjectiveSettings
) -> NDArray[np.int64]:
    """Rearrange some documents of a window (L,); three special tokens per document push its end out.

    Args:
        random: (≥ number of documents, 4) numbers in [0, 1).
    """
    starts = np.flatnonzero(tokens == special.end_of_text)
    pieces = np.split(tokens, starts[starts > 0])
    parts = []
    for piece, (choice, order, *cuts) in zip(pieces, random, strict=False):
        lead = int(piece[0] == special.end_of_text)  # stays in front
        text = piece[lead:]
        if choice >= settings.fim_rate or len(text) < MIN_TOKENS:
            parts.append(piece)
            continue
        first, second = sorted((np.array(cuts) * (len(text) + 1)).astype(int))
        parts += [piece[:lead], move_middle(text, first, second, special, suffix_first=order < settings.spm_share)]
    return np.concatenate(parts)[: len(tokens)]


def move_middle(
    text: NDArray[np.int64], first: int, second: int, special: SpecialTokens, *, suffix_first: bool = False
) -> NDArray[np.int64]:
    """Move tokens `first` to `second` − 1 of the text (n,) to its end and add special tokens: (n + 3,)."""
    prefix, middle, suffix = np.split(text, [first, second])
    if suffix_first:
        return np.concatenate([[special.prefix, special.suffix], suffix, [special.middle], prefix, middle])
    return np.concatenate([[special.prefix], prefix, [special.suffix], suffix, [special.middle], middle])


def make_fim_prompt(prefix: list[int], suffix: list[int], special: SpecialTokens) -> list[int]:
    """Return the prompt after which a model generates the middle."""
    return [special.end_of_text, special.prefix, *prefix, special.suffix, *suffix, special.middle]
