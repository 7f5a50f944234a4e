"""nanoGPT's train.bin and val.bin (uint16 tokens): validate and describe them; they are used in place."""

import hashlib
import logging
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.token_preparation import count_bytes
from gpt2lab.data.token_file import map_file
from gpt2lab.data.tokenizer import load_tokenizer, make_numbered_tokenizer, prepare_tokenizer
from gpt2lab.errors import InputError
from gpt2lab.settings import TokenizerChoice
from gpt2lab.storage.hub import is_hub_id
from gpt2lab.storage.prepared_cache import content_hash, get_or_build

log = logging.getLogger(__name__)

FILES = ("train.bin", "val.bin")
DTYPE = np.dtype("<u2")
LLM_C = np.array([20240520, 1], "<i4").tobytes()  # start of a file of llm.c: magic number and version
LLM_C_HEADER = 1024  # bytes: 256 int32
GPT2_VOCAB_SIZE = 50_257
CHECKED = 2**20  # tokens at the start of train.bin whose range is checked; val.bin is checked completely


def bin_facts(folder: Path, choice: TokenizerChoice, cache_dir: Path) -> tuple[str, dict[str, Any]]:
    """Return (tokenizer folder, facts) of a folder with train.bin and val.bin. A meta.pkl is not opened.

    If GPT-2's tokenizer is requested but unavailable, tokens are decoded to numbers and bytes are not counted.

    Raises:
        InputError: a file is missing, has a header or is not a uint16 file, or the tokenizer does not fit.
    """
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"data=bin path={folder}: {' and '.join(missing)} not found.\n"
            "Give the folder in which nanoGPT's prepare.py wrote train.bin and val.bin: path=FOLDER"
        )
    for name in FILES:
        _check_layout(folder / name)
    if choice.kind != "pretrained":
        raise InputError("data=bin already contains tokens; name the tokenizer that made them: tokenizer=hub")
    tokenizer_folder, is_available = _tokenizer(choice, cache_dir)
    tokenizer = load_tokenizer(tokenizer_folder)
    train, val = (map_file(folder / name, DTYPE) for name in FILES)
    for name, tokens in zip(FILES, (train[:CHECKED], val), strict=True):
        highest = int(tokens.max(initial=0))
        if highest >= len(tokenizer):
            raise InputError(
                f"{folder / name} contains token {highest}, but {choice.source} has {len(tokenizer)} tokens.\n"
                "Name the tokenizer that made the file: tokenizer=hub tokenizer.source=FOLDER_OR_HUB_ID"
            )
    return tokenizer_folder, {
        "vocab_size": len(tokenizer),
        "dtype": DTYPE.str,
        "val_bytes": count_bytes(val[1:], tokenizer) if is_available else 0,
        "hash": content_hash([_fingerprint(train), _fingerprint(val)])[:16],
    }


def _check_layout(file: Path) -> None:
    """Check that a file can consist of uint16 tokens alone."""
    with file.open("rb") as stream:
        has_header = stream.read(len(LLM_C)) == LLM_C
    if has_header:
        command = f"tail -c +{LLM_C_HEADER + 1} {shlex.quote(str(file))} > FOLDER/{file.name}"
        raise InputError(
            f"{file} begins with the header of llm.c; data=bin reads files of token ids alone, as nanoGPT's.\n"
            f"Copy what follows the header: {command}"
        )
    if file.stat().st_size % DTYPE.itemsize:
        raise InputError(f"{file} has an odd number of bytes, so it does not contain uint16 tokens; write it again.")


def _tokenizer(choice: TokenizerChoice, cache_dir: Path) -> tuple[str, bool]:
    """Return (folder, whether it is the requested tokenizer and not the numbered one)."""
    try:
        return prepare_tokenizer(choice, "bin", {}, lambda: iter(()), cache_dir), True
    except InputError as error:
        if not is_hub_id(choice.source) or not choice.source.rpartition("/")[2].startswith("gpt2"):
            raise
        log.warning(
            "the tokenizer %s is unavailable, so samples show token numbers and bits per byte is omitted (%s)",
            choice.source,
            str(error).splitlines()[0],
        )

    def build(folder: Path) -> dict[str, Any]:
        make_numbered_tokenizer(GPT2_VOCAB_SIZE).save_pretrained(folder)
        return {"vocab_size": GPT2_VOCAB_SIZE}

    return str(get_or_build("tokenizers", "numbers", {"numbers": GPT2_VOCAB_SIZE}, build, cache_dir)), False


def _fingerprint(tokens: np.ndarray) -> str:
    """Hash the length and three stretches of a million tokens, because the file may be far larger than memory."""
    digest = hashlib.sha256(str(len(tokens)).encode())
    for start in (0, len(tokens) // 2, max(len(tokens) - CHECKED, 0)):
        digest.update(tokens[start : start + CHECKED].tobytes())
    return digest.hexdigest()
