"""From documents to token files: which side of the split a document lies on, and writing the tokens."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from datamodules.documents import Corpus, Document
from gpt2lab.data.token_file import token_dtype
from gpt2lab.data.tokenizer import TextEncoder
from gpt2lab.errors import InputError

ENCODED_TOGETHER = 2**21  # characters tokenized in one call
HASHES = 2**64
TRAIN, VAL = "train", "val"

PlacedDocuments = Callable[[], Iterator[tuple[str, Document]]]  # (side, document) as often as asked


def split_corpus(corpus: Corpus, val_fraction: float) -> PlacedDocuments:
    """Each document with its side, "train" or "val": the corpus's own, or by a hash of the document's key.

    The hash knows nothing of the run's seed, so runs with different seeds validate on the same text. Both sides get at
    least one document; of a single document the last `val_fraction` is the validation side.

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
    return lambda: ((VAL if _place(doc.key) < threshold else TRAIN, doc) for doc in corpus.documents())


def _threshold(corpus: Corpus, val_fraction: float) -> tuple[int | None, int]:
    """(the hash below which documents are validation, characters seen); None where there is only one document.

    It is `val_fraction` of all hashes, moved only where that would leave a side empty. Reading ends as soon as both
    sides have been met.
    """
    wanted = int(val_fraction * HASHES)
    smallest, largest, characters = HASHES, -1, 0
    for document in corpus.documents():
        place = _place(document.key)
        smallest, largest = min(smallest, place), max(largest, place)
        characters += len(document.text)
        if smallest < wanted <= largest:
            return wanted, characters
    if largest < 0:
        raise InputError(f"data={corpus.name} is empty: no document with any text.\nGive files that hold text.")
    if smallest == largest:
        return None, characters
    return min(max(wanted, smallest + 1), largest), characters


def _cut(documents: Iterable[Document], place: int) -> Iterator[tuple[str, Document]]:
    """What stands before character `place` is training text; the cut lies at a line end near it."""
    for document in documents:
        if place >= len(document.text):
            yield TRAIN, document
        elif place <= 0:
            yield VAL, document
        else:
            near = document.text.rfind("\n", 0, place) + 1 or place
            yield TRAIN, Document(document.key, document.text[:near], document.continues)
            yield VAL, Document(document.key, document.text[near:])
        place -= len(document.text)


def _place(key: str) -> int:
    """A number in [0, 2^64) that depends on the key alone."""
    return int.from_bytes(hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest(), "big")


def write_token_files(
    folder: Path, documents: Iterable[tuple[str, Document]], tokenizer: PreTrainedTokenizerFast, progress: tqdm
) -> dict[str, dict[str, Any]]:
    """Write folder/train.bin and folder/val.bin in one pass; memory does not grow with the corpus.

    Returns:
        By side: documents, tokens, bytes (UTF-8 bytes of the text; end-of-text spells none) and sha256 of the file.
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
    """Appends documents to a token file: end-of-text, then the text, so that every byte of text is predicted."""

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerFast, progress: tqdm) -> None:
        self._file = path.open("wb")
        self._encode = TextEncoder(tokenizer)
        self._end_of_text = tokenizer.eos_token_id
        self._dtype = token_dtype(len(tokenizer))
        self._progress = progress
        self._waiting: list[Document] = []
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
        self._waiting.append(document)
        self._characters += len(document.text)
        if self._characters >= ENCODED_TOGETHER:
            self._flush()

    def facts(self) -> dict[str, Any]:
        sha256 = self._digest.hexdigest()
        return {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes, "sha256": sha256}

    def _flush(self) -> None:
        texts = [document.text for document in self._waiting]
        ids: list[int] = []
        for document, tokens in zip(self._waiting, self._encode(texts), strict=True):
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
        self._progress.update(written)
        self._waiting, self._characters = [], 0


def bytes_spelt(tokens: NDArray[np.unsignedinteger], tokenizer: PreTrainedTokenizerFast) -> int:
    """UTF-8 bytes that the tokens of a byte-level tokenizer spell: one for each character of their written form."""
    special = set(tokenizer.all_special_ids)
    lengths = np.zeros(len(tokenizer), dtype=np.int64)
    for token, number in tokenizer.get_vocab().items():
        lengths[number] = 0 if number in special else len(token)
    together = 2**20
    return sum(int(lengths[tokens[start : start + together]].sum()) for start in range(0, len(tokens), together))
