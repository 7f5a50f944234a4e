"""Token bytes: the bytes that each token of a byte-level tokenizer stands for."""

import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gpt2lab.data.tokenizer import TextEncoder
from gpt2lab.errors import InputError

PROBE = "A café, 中文\r\n\t🙂  \n\n  e\u0301 ﬁn<|endoftext|>"  # text that normalizers and added spaces change


def byte_characters() -> dict[str, int]:
    """Return GPT-2's character → byte map of a byte-level vocabulary.

    Printable bytes map to themselves, the others in order to the characters from 256 on.
    """
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    themselves = {chr(byte): byte for byte in range(256) if chr(byte) in alphabet}
    others = (byte for byte in range(256) if chr(byte) not in alphabet)
    return {**themselves, **{chr(256 + number): byte for number, byte in enumerate(others)}}


def bytes_of_tokens(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the number of bytes of each token of a byte-level BPE, (V,) int64; 0 for special tokens.

    In a byte-level vocabulary (GPT-2's, and those trained here) each character of a token represents one byte.
    """
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return torch.tensor([0 if number in special else len(token or "") for number, token in enumerate(tokens)])


def spell_tokens(tokenizer: PreTrainedTokenizerFast, source: str) -> list[bytes | None]:
    """Return the bytes of each token (V,); None for special tokens.

    Args:
        source: source of the tokenizer, for messages.

    Raises:
        InputError: the tokens of a text do not concatenate to its bytes.
    """
    characters, added, special = byte_characters(), tokenizer.get_added_vocab(), set(tokenizer.all_special_ids)
    spelled: list[bytes | None] = []
    for number, entry in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        if number in special or entry is None:
            spelled.append(None)
        elif entry in added:
            spelled.append(entry.encode())
        else:
            spelled.append(bytes(characters[letter] for letter in entry) if set(entry) <= characters.keys() else b"")
    of_probe = [spelled[number] for number in TextEncoder(tokenizer)([PROBE])[0]]
    has_all_bytes = {bytes([byte]) for byte in range(256)} <= set(spelled)
    if not has_all_bytes or None in of_probe or b"".join(part or b"" for part in of_probe) != PROBE.encode():
        raise InputError(
            f"The tokens of {source}'s tokenizer do not concatenate to the bytes of a text, as GPT-2's do, so they "
            "cannot be\naligned. loss=uld needs two byte-level BPE tokenizers without normalizer or added space."
        )
    return spelled


def map_special_tokens(theirs: PreTrainedTokenizerBase, ours: PreTrainedTokenizerBase) -> dict[int, int]:
    """Map our special token ids to theirs: the one of the same name, else end-of-text."""
    names = dict(zip(ours.convert_ids_to_tokens(ours.all_special_ids), ours.all_special_ids, strict=True))
    known = dict(zip(theirs.convert_ids_to_tokens(theirs.all_special_ids), theirs.all_special_ids, strict=True))
    return {number: known.get(name, theirs.eos_token_id) for name, number in names.items()}
