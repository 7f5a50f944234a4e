"""From documents to token files: which side of the split a document lies on, and writing the tokens."""

from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from datamodules.documents import Corpus, Document
from gpt2lab.errors import InputError
from gpt2lab.token_file import token_dtype
from gpt2lab.tokenizer import TextEncoder

ENCODED_TOGETHER = 64  # documents tokenized in one call; at most 64 Ki characters each where they come from text files
HASHES = 2**64

Documents = Callable[[], Iterator[Document]]


def split_corpus(corpus: Corpus, val_fraction: float) -> tuple[Documents, Documents]:
    """(training documents, validation documents): the corpus's own sides, or by a hash of each document's key.

    The hash knows nothing of the run's seed, so runs with different seeds validate on the same text. Both sides get at
    least one document.

    Raises:
        InputError: fewer than two documents.
    """
    if corpus.validation is not None:
        return corpus.documents, corpus.validation
    threshold = _threshold(corpus, val_fraction)

    def side(validation: bool) -> Documents:
        return lambda: (doc for doc in corpus.documents() if (_place(doc.key) < threshold) == validation)

    return side(validation=False), side(validation=True)


def _threshold(corpus: Corpus, val_fraction: float) -> int:
    """Hashes below it are validation: `val_fraction` of all, moved only where that would leave a side empty."""
    wanted = int(val_fraction * HASHES)
    smallest, largest = HASHES, -1
    for document in corpus.documents():
        place = _place(document.key)
        smallest, largest = min(smallest, place), max(largest, place)
        if smallest < wanted <= largest:
            return wanted
    if largest < 0:
        raise InputError(f"data={corpus.name} is empty: no document with any text.\nGive files that hold text.")
    if smallest == largest:
        raise InputError(
            f"data={corpus.name} holds one document; training and validation need one each.\n"
            "Give more text, or validation text of its own: val_path=FILE"
        )
    return min(max(wanted, smallest + 1), largest)


def _place(key: str) -> int:
    """A number in [0, 2^64) that depends on the key alone."""
    return int.from_bytes(blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest(), "big")


def write_tokens(
    path: Path, documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast, name: str
) -> dict[str, int]:
    """Write each document's tokens, then end-of-text; memory does not grow with the corpus.

    Returns:
        documents, tokens, and bytes: the UTF-8 bytes of the text (end-of-text spells none).
    """
    dtype = token_dtype(len(tokenizer))
    counts = {"documents": 0, "tokens": 0, "bytes": 0}
    progress = tqdm(desc=f"{name}: {path.stem} tokens", unit=" tokens", unit_scale=True, disable=None)
    remaining = iter(documents)
    encode = TextEncoder(tokenizer)
    with path.open("wb") as file:
        while together := list(islice(remaining, ENCODED_TOGETHER)):
            texts = [document.text.encode("utf-8", "replace").decode() for document in together]
            ids = [token for tokens in encode(texts) for token in (*tokens, tokenizer.eos_token_id)]
            file.write(np.array(ids, dtype=dtype).tobytes())
            counts["documents"] += len(together)
            counts["tokens"] += len(ids)
            counts["bytes"] += sum(len(text.encode()) for text in texts)
            progress.update(len(ids))
    progress.close()
    return counts


def bytes_spelt(tokens: NDArray[np.unsignedinteger], tokenizer: PreTrainedTokenizerFast) -> int:
    """UTF-8 bytes that the tokens of a byte-level tokenizer spell: one for each character of their written form."""
    special = set(tokenizer.all_special_ids)
    lengths = np.zeros(len(tokenizer), dtype=np.int64)
    for token, number in tokenizer.get_vocab().items():
        lengths[number] = 0 if number in special else len(token)
    together = 2**20
    return sum(int(lengths[tokens[start : start + together]].sum()) for start in range(0, len(tokens), together))
