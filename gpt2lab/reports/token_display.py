"""Token text: how single tokens are shown to a reader, with signs for what cannot be seen."""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from gpt2lab.data.special_tokens import MASK_BYTE, MIDDLE_BYTE, PLACE, PREFIX_BYTE, SUFFIX_BYTE
from gpt2lab.data.token_bytes import byte_characters

MARKS = {MASK_BYTE: PLACE, PREFIX_BYTE: "<|prefix|>", SUFFIX_BYTE: "<|suffix|>", MIDDLE_BYTE: "<|middle|>"}
SIGNS = str.maketrans({" ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥"})


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> list[str]:
    """What each token spells: whitespace as it is, bytes that are no whole character as `\\xe4`, marks by their names.

    Of a tokenizer that is not byte-level the entries themselves.
    """
    characters = byte_characters()
    return [_text(str(entry), characters) for entry in tokenizer.convert_ids_to_tokens(list(ids))]


def with_signs(text: str) -> str:
    """A token's text with signs for whitespace, for tables and labels."""
    return "".join(letter if letter.isprintable() else _sign(letter) for letter in text.translate(SIGNS))


def _text(entry: str, characters: dict[str, int]) -> str:
    if not set(entry) <= characters.keys():
        return entry
    spelled = bytes(characters[letter] for letter in entry)
    if len(spelled) == 1 and spelled[0] in MARKS:
        return MARKS[spelled[0]]
    return spelled.decode("utf-8", errors="backslashreplace")


def _sign(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
