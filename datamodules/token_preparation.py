"""Preparation of token files: split documents into training and validation, tokenize and write them."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from datamodules.documents import Corpus, Document
from gpt2lab.data.token_bytes import bytes_of_tokens
from gpt2lab.data.token_file import token_dtype
from gpt2lab.data.tokenizer import TextEncoder
from gpt2lab.errors import InputError
from gpt2lab.system.terminal import Phase

CHUNK_CHARACTERS = 2**21  # tokenized in one call
HASHES = 2**64
TRAIN, VAL = "train", "val"

SplitDocuments = Callable[[], Iterator[tuple[str, Document]]]  # (side, document), can be called repeatedly


def split_corpus(corpus: Corpus, val_fraction: float) -> SplitDocuments:
    """Assign each document to "train" or "val", as the corpus does or by a hash of the document's text.

    The hash does not depend on the run's seed, so runs with different seeds validate on the same text. Both sides have
    at least one document; a single document is cut, and its last `val_fraction` is the validation side.

    Raises:
        InputError: no document with any text.
    """
    validation = corpus.validation
    if validation is not None:
        sides = ((TRAIN, corpus.documents), (VAL, validation))
        return lambda: ((side, document) for side, documents in sides for document in documents())
    threshold, characters = _threshold(corpus, val_fraction)
    if threshold is None:
        return lambda: _cut(corpus.documents(), max(int(characters * (1 - val_fraction)), 1))
    return lambda: ((VAL if hash_text(doc.key) < threshold else TRAIN, doc) for doc in corpus.documents())


def _threshold(corpus: Corpus, val_fraction: float) -> tuple[int | None, int]:
    """Return (threshold hash of validation documents or None for a single document, characters read).

    The threshold is `val_fraction` of the hash range, adjusted only if a side would be empty. Reading stops as soon as
    both sides have a document.
    """
    threshold = int(val_fraction * HASHES)
    smallest, largest, characters = HASHES, -1, 0
    for document in corpus.documents():
        key_hash = hash_text(document.key)
        smallest, largest = min(smallest, key_hash), max(largest, key_hash)
        characters += len(document.text)
        if smallest < threshold <= largest:
            return threshold, characters
    if largest < 0:
        raise InputError(f"data={corpus.name} is empty: no document with any text.\nGive files with text.")
    if smallest == largest:
        return None, characters
    return min(max(threshold, smallest + 1), largest), characters


def _cut(documents: Iterable[Document], position: int) -> Iterator[tuple[str, Document]]:
    """Yield the text before character `position` as training text and the rest as validation, cut at a line end."""
    for document in documents:
        if position >= len(document.text):
            yield TRAIN, document
        elif position <= 0:
            yield VAL, document
        else:
            line_end = document.text.rfind("\n", 0, position) + 1 or position
            yield TRAIN, Document(document.key, document.text[:line_end], document.continues)
            yield VAL, Document(document.key, document.text[line_end:])
        position -= len(document.text)


def hash_text(text: str) -> int:
    """Hash a document's key or a source text to [0, 2^64), for the split."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest(), "big")


def write_token_files(
    folder: Path, documents: Iterable[tuple[str, Document]], tokenizer: PreTrainedTokenizerFast, progress: Phase
) -> dict[str, dict[str, Any]]:
    """Write folder/train.bin and folder/val.bin in one pass, with memory independent of the corpus size.

    Returns:
        Side → documents, tokens, bytes (UTF-8 bytes of the text, without end-of-text) and sha256 of the file.
    """
    with (
        progress,
        _TokenWriter(folder / "train.bin", tokenizer, progress) as train,
        _TokenWriter(folder / "val.bin", tokenizer, progress) as val,
    ):
        writers = {TRAIN: train, VAL: val}
        for side, document in documents:
            writers[side].add(document)
    return {side: writer.facts() for side, writer in writers.items()}


class _TokenWriter:
    """Writer of a token file: end-of-text before each document, so that every byte of text is a target."""

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerFast, progress: Phase) -> None:
        self._file = path.open("wb")
        self._encode = TextEncoder(tokenizer)
        self._end_of_text = tokenizer.eos_token_id
        self._dtype = token_dtype(len(tokenizer))
        self._progress = progress
        self._buffer: list[Document] = []
        self._characters = 0
        self._digest = hashlib.sha256()
        self.documents = self.tokens = self.bytes = 0

    def __enter__(self) -> "_TokenWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if error is None:
                self._flush()

    def add(self, document: Document) -> None:
        self._buffer.append(document)
        self._characters += len(document.text)
        if self._characters >= CHUNK_CHARACTERS:
            self._flush()

    def facts(self) -> dict[str, Any]:
        sha256 = self._digest.hexdigest()
        return {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes, "sha256": sha256}

    def _flush(self) -> None:
        texts = [document.text for document in self._buffer]
        ids: list[int] = []
        for document, tokens in zip(self._buffer, self._encode(texts), strict=True):
            if not document.continues or not (self.tokens or ids):
                ids.append(self._end_of_text)
                self.documents += 1
            ids.extend(tokens)
        content = np.array(ids, dtype=self._dtype).tobytes()
        self._file.write(content)
        self._digest.update(content)
        self.tokens += len(ids)
        written = sum(len(text.encode()) for text in texts)
        self.bytes += written
        self._progress.advance(written)
        self._buffer, self._characters = [], 0


def count_bytes(tokens: NDArray[np.integer], tokenizer: PreTrainedTokenizerFast) -> int:
    """Count the UTF-8 bytes of the tokens of a byte-level tokenizer."""
    lengths, together = bytes_of_tokens(tokenizer).numpy(), 2**20
    return sum(int(lengths[tokens[start : start + together]].sum()) for start in range(0, len(tokens), together))
