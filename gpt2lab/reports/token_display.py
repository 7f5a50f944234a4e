"""Token display: the text of single tokens, with visible signs for whitespace and special tokens."""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from gpt2lab.data.special_tokens import MASK_BYTE, MASK_PLACEHOLDER, MIDDLE_BYTE, PREFIX_BYTE, SUFFIX_BYTE
from gpt2lab.data.token_bytes import byte_characters

NAMES = {MASK_BYTE: MASK_PLACEHOLDER, PREFIX_BYTE: "<|prefix|>", SUFFIX_BYTE: "<|suffix|>", MIDDLE_BYTE: "<|middle|>"}
SIGNS = str.maketrans({" ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥"})


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> list[str]:
    """Return the text of each token, incomplete characters as `\\xe4` and special tokens by name.

    For a tokenizer that is not byte-level, the tokens are returned unchanged.
    """
    characters = byte_characters()
    return [_text(str(token), characters) for token in tokenizer.convert_ids_to_tokens(list(ids))]


def with_signs(text: str) -> str:
    """Replace whitespace and unprintable characters by visible signs, for tables and labels."""
    return "".join(letter if letter.isprintable() else _sign(letter) for letter in text.translate(SIGNS))


def _text(token: str, characters: dict[str, int]) -> str:
    if not set(token) <= characters.keys():
        return token
    data = bytes(characters[letter] for letter in token)
    if len(data) == 1 and data[0] in NAMES:
        return NAMES[data[0]]
    return data.decode("utf-8", errors="backslashreplace")


def _sign(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
