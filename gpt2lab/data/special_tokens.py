"""Special tokens of mlm and fim: byte tokens of a byte-level BPE that occur in no text.

Some bytes occur in no UTF-8 text (RFC 3629, section 3: C0, C1 and F5 to FF), but every byte-level BPE, GPT-2's too, has
a token for each. So objectives can be switched without a change of the vocabulary.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpt2lab.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MASK_BYTE, PREFIX_BYTE, SUFFIX_BYTE, MIDDLE_BYTE = 0xFF, 0xFE, 0xFD, 0xFC
MASK_PLACEHOLDER = "<|mask|>"  # gap to fill in a prompt


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids of the special tokens, and the vocabulary size."""

    mask: int
    prefix: int
    suffix: int
    middle: int
    end_of_text: int
    vocab_size: int


def find_special_tokens(tokenizer: "PreTrainedTokenizerBase") -> SpecialTokens:
    """Find the special tokens in a tokenizer's vocabulary.

    Raises:
        InputError: it is not a byte-level BPE.
    """
    from gpt2lab.data.token_bytes import byte_characters  # imports transformers, which most importers do not need

    vocabulary = tokenizer.get_vocab()
    letter_of = {byte: letter for letter, byte in byte_characters().items()}
    letters = [letter_of[byte] for byte in (MASK_BYTE, PREFIX_BYTE, SUFFIX_BYTE, MIDDLE_BYTE)]
    if not all(letter in vocabulary for letter in letters):
        raise InputError(
            "This objective uses byte tokens that occur in no text as special tokens. The tokenizer has none: it is "
            "not a byte-level BPE.\nUse objective=clm, or tokenizer=bpe."
        )
    assert isinstance(tokenizer.eos_token_id, int)
    mask, prefix, suffix, middle = (vocabulary[letter] for letter in letters)
    return SpecialTokens(mask, prefix, suffix, middle, tokenizer.eos_token_id, len(tokenizer))
