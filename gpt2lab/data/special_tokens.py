"""Marks: entries of a byte-level vocabulary that no text contains, for objectives that need a sign of their own.

Some bytes occur in no UTF-8 text (RFC 3629, section 3: C0, C1 and F5 to FF), yet every byte-level BPE has an entry for
each, GPT-2's own too. So a model can go from one objective to another and is exported with the vocabulary it has.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpt2lab.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MASK_BYTE, PREFIX_BYTE, SUFFIX_BYTE, MIDDLE_BYTE = 0xFF, 0xFE, 0xFD, 0xFC
PLACE = "<|mask|>"  # in prompts: what is to be filled in


@dataclass(frozen=True)
class Marks:
    """Token ids of the signs, and of end-of-text; `entries` is the size of the vocabulary."""

    mask: int
    prefix: int
    suffix: int
    middle: int
    end_of_text: int
    entries: int


def marks_of(tokenizer: "PreTrainedTokenizerBase") -> Marks:
    """The marks in a tokenizer's vocabulary.

    Raises:
        InputError: it is no byte-level BPE.
    """
    from gpt2lab.data.token_bytes import (
        byte_characters,  # imports transformers, which those who read a prompt do not need
    )

    vocabulary = tokenizer.get_vocab()
    letter_of = {byte: letter for letter, byte in byte_characters().items()}
    letters = [letter_of[byte] for byte in (MASK_BYTE, PREFIX_BYTE, SUFFIX_BYTE, MIDDLE_BYTE)]
    if not all(letter in vocabulary for letter in letters):
        raise InputError(
            "This objective marks places with bytes that no text contains, and the tokenizer has no entry for them: it "
            "is no byte-level BPE.\nUse objective=clm, or tokenizer=bpe."
        )
    assert isinstance(tokenizer.eos_token_id, int)
    mask, prefix, suffix, middle = (vocabulary[letter] for letter in letters)
    return Marks(mask, prefix, suffix, middle, tokenizer.eos_token_id, len(tokenizer))
