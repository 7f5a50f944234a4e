"""nanoGPT's train.bin and val.bin (uint16 tokens): checked and described, used where they lie."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.token_preparation import bytes_spelt
from gpt2lab.data.tokenizer import load_tokenizer, numbered_tokenizer, prepare_tokenizer
from gpt2lab.errors import InputError
from gpt2lab.settings import TokenizerChoice
from gpt2lab.storage.hub import is_hub_id
from gpt2lab.storage.prepared_cache import content_hash, prepared

log = logging.getLogger(__name__)

FILES = ("train.bin", "val.bin")
DTYPE = np.dtype("<u2")
GPT2_ENTRIES = 50_257
LOOKED_AT = 2**20  # tokens at the start of train.bin whose range is checked; val.bin is checked whole


def bin_facts(folder: Path, choice: TokenizerChoice, cache_dir: Path) -> tuple[str, dict[str, Any]]:
    """(tokenizer folder, facts) of a folder with train.bin and val.bin. A meta.pkl beside them is not opened.

    Where GPT-2's tokenizer is meant but cannot be had, tokens are written as numbers and no bytes are counted.

    Raises:
        InputError: a file is missing or is no uint16 file, or the tokenizer does not fit.
    """
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"data=bin path={folder}: {' and '.join(missing)} not found.\n"
            "Give the folder in which nanoGPT's prepare.py wrote train.bin and val.bin: path=FOLDER"
        )
    for name in FILES:
        if (folder / name).stat().st_size % DTYPE.itemsize:
            raise InputError(
                f"{folder / name} has an odd number of bytes, so it holds no uint16 tokens; write it again."
            )
    if choice.kind != "pretrained":
        raise InputError("data=bin holds tokens already; name the tokenizer that made them: tokenizer=hub")
    tokenizer_folder, spells = _tokenizer(choice, cache_dir)
    tokenizer = load_tokenizer(tokenizer_folder)
    train, val = (_tokens(folder / name) for name in FILES)
    for name, tokens in zip(FILES, (train[:LOOKED_AT], val), strict=True):
        highest = int(tokens.max(initial=0))
        if highest >= len(tokenizer):
            raise InputError(
                f"{folder / name} holds token {highest}, but {choice.source} has {len(tokenizer)} entries.\n"
                "Name the tokenizer that made the file: tokenizer=hub tokenizer.source=FOLDER_OR_HUB_ID"
            )
    return tokenizer_folder, {
        "vocab_size": len(tokenizer),
        "dtype": DTYPE.str,
        "val_bytes": bytes_spelt(val[1:], tokenizer) if spells else 0,
        "hash": content_hash([_fingerprint(train), _fingerprint(val)])[:16],
    }


def _tokenizer(choice: TokenizerChoice, cache_dir: Path) -> tuple[str, bool]:
    """(folder, whether it is the tokenizer meant, so that it spells the text)."""
    try:
        return prepare_tokenizer(choice, "bin", {}, lambda: iter(()), cache_dir), True
    except InputError as error:
        if not is_hub_id(choice.source) or not choice.source.rpartition("/")[2].startswith("gpt2"):
            raise
        log.warning(
            "the tokenizer %s cannot be had, so samples show token numbers and bits per byte are left out (%s)",
            choice.source,
            str(error).splitlines()[0],
        )

    def build(folder: Path) -> dict[str, Any]:
        numbered_tokenizer(GPT2_ENTRIES).save_pretrained(folder)
        return {"vocab_size": GPT2_ENTRIES}

    return str(prepared("tokenizers", "numbers", {"numbers": GPT2_ENTRIES}, build, cache_dir)), False


def _tokens(path: Path) -> np.ndarray:
    return np.memmap(path, dtype=DTYPE, mode="r") if path.stat().st_size else np.empty(0, DTYPE)


def _fingerprint(tokens: np.ndarray) -> str:
    """Length, and SHA-256 of three stretches of a million tokens: the whole file may be far larger than memory."""
    digest = hashlib.sha256(str(len(tokens)).encode())
    for start in (0, len(tokens) // 2, max(len(tokens) - LOOKED_AT, 0)):
        digest.update(tokens[start : start + LOOKED_AT].tobytes())
    return digest.hexdigest()
