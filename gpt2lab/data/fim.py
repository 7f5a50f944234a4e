"""Fill in the middle: documents whose middle part stands at their end, so that a causal model learns to fill a gap.

Source: Bavarian et al. 2022, arXiv 2207.14255: cut points on whole tokens, a share of documents left alone, of the
others half with the suffix before the prefix (SPM).
"""

import numpy as np
from numpy.typing import NDArray

from gpt2lab.data.special_tokens import Marks
from gpt2lab.settings import ObjectiveSettings

SHORTEST = 3  # tokens of a document's text


def rearranged(
    tokens: NDArray[np.int64], random: NDArray[np.float64], marks: Marks, settings: ObjectiveSettings
) -> NDArray[np.int64]:
    """A window (L,) with some of its documents rearranged, as long as it was: three signs a document push its end out.

    Args:
        random: (≥ number of documents, 4) numbers in [0, 1).
    """
    starts = np.flatnonzero(tokens == marks.end_of_text)
    pieces = np.split(tokens, starts[starts > 0])
    parts = []
    for piece, (wanted, order, *cuts) in zip(pieces, random, strict=False):
        lead = int(piece[0] == marks.end_of_text)  # stays in front
        text = piece[lead:]
        if wanted >= settings.fim_rate or len(text) < SHORTEST:
            parts.append(piece)
            continue
        first, second = sorted((np.array(cuts) * (len(text) + 1)).astype(int))
        parts += [piece[:lead], moved(text, first, second, marks, suffix_first=order < settings.spm_share)]
    return np.concatenate(parts)[: len(tokens)]


def moved(
    text: NDArray[np.int64], first: int, second: int, marks: Marks, *, suffix_first: bool = False
) -> NDArray[np.int64]:
    """The text (n,) with its tokens `first` to `second` − 1 last: (n + 3,)."""
    prefix, middle, suffix = np.split(text, [first, second])
    if suffix_first:
        return np.concatenate([[marks.prefix, marks.suffix], suffix, [marks.middle], prefix, middle])
    return np.concatenate([[marks.prefix], prefix, [marks.suffix], suffix, [marks.middle], middle])


def gap_prompt(prefix: list[int], suffix: list[int], marks: Marks) -> list[int]:
    """What a model is given to write what stands between the two."""
    return [marks.end_of_text, marks.prefix, *prefix, marks.suffix, *suffix, marks.middle]
