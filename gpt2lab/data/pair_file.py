"""Tokenized pairs on disk: one flat file of token ids, one index entry per pair, references as JSON lines.

    tokens.bin         prompt and response of pair 0, of pair 1, …; little-endian uint16, or uint32 if V > 65,536
    index.bin          one INDEX_ENTRY per pair
    references.jsonl   {"source": …, "reference": …} per pair, validation side only

Reading is memory-mapped: memory does not grow with the number of pairs.
"""

import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt2lab.data.document_groups import merge_groups
from gpt2lab.data.token_file import token_dtype
from gpt2lab.storage.damaged_files import warn_once

# `offset` counts tokens in tokens.bin, `prompt` and `response` are lengths in tokens, `reference` is a byte offset in
# references.jsonl or −1, `number` counts all pairs of that side of the split including skipped ones, and `group` is a
# hash of the source file or source text: equal for pairs of one document.
INDEX_ENTRY = np.dtype(
    [
        ("offset", "<i8"),
        ("prompt", "<i4"),
        ("response", "<i4"),
        ("reference", "<i8"),
        ("number", "<i8"),
        ("group", "<i8"),
    ]
)


COUNTED_AT_A_TIME = 2**14  # pairs


class PairFileWriter:
    """Context manager that writes pairs to a new folder and counts `pairs` and `response_tokens`."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        folder.mkdir(parents=True)
        self._dtype = token_dtype(vocab_size)
        self._files = ExitStack()
        self._tokens, self._index, self._references = (
            self._files.enter_context((folder / name).open("wb"))
            for name in ("tokens.bin", "index.bin", "references.jsonl")
        )
        self._offset = 0
        self.pairs = 0
        self.response_tokens = 0

    def __enter__(self) -> "PairFileWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def add(
        self,
        number: int,
        prompt: list[int],
        response: list[int],
        reference: dict[str, str] | None = None,
        group: int = 0,
    ) -> None:
        offset = -1
        if reference is not None:
            offset = self._references.tell()
            self._references.write(json.dumps(reference, ensure_ascii=False).encode() + b"\n")
        self._tokens.write(np.array(prompt + response, dtype=self._dtype).tobytes())
        entry = (self._offset, len(prompt), len(response), offset, number, group)
        self._index.write(np.array(entry, dtype=INDEX_ENTRY).tobytes())
        self._offset += len(prompt) + len(response)
        self.pairs += 1
        self.response_tokens += len(response)


class PairFile:
    """Random access to the pairs of a folder written by PairFileWriter, with at least one pair.

    Attributes:
        numbers: (pairs,) int64, ascending: number of each pair on its side of the split, independent of the tokenizer.
    """

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self.folder = folder
        self._tokens = np.memmap(folder / "tokens.bin", dtype=token_dtype(vocab_size), mode="r")  # (all tokens,)
        self._index: NDArray[np.void] = np.memmap(folder / "index.bin", dtype=INDEX_ENTRY, mode="r")  # (pairs,)
        self._all_groups: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self._index)

    @property
    def numbers(self) -> NDArray[np.int64]:
        return self._index["number"]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of prompt and response of each pair, (pairs,)."""
        return (self._index["prompt"] + self._index["response"]).astype(np.int64)

    def keep(self, numbers: NDArray[np.int64]) -> None:
        """Drop all pairs except those with these numbers."""
        self._index = self._index[np.isin(self.numbers, numbers)]
        self._all_groups = None

    @property
    def all_groups(self) -> NDArray[np.int64]:
        """Unique group hashes, ascending; of several files after `share_groups`."""
        if self._all_groups is None:
            self._all_groups = np.unique(self._index["group"])
        return self._all_groups

    def document_groups(self, rows: NDArray[np.int64]) -> Tensor:
        """Return the document group of each target of the pairs `rows`, (n,) int64."""
        groups = merge_groups(*self._group_numbers(rows))
        return groups.repeat_interleave(torch.from_numpy(self.target_counts(rows)))

    def pair_groups(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the document group (n,) of each of the pairs `rows`."""
        return self._group_numbers(rows)[0].numpy()

    def _group_numbers(self, rows: NDArray[np.int64]) -> tuple[Tensor, int]:
        """Return (group numbers (n,) of the pairs `rows`, number of groups of the file)."""
        if len(self.all_groups) > 1:
            numbers = np.searchsorted(self.all_groups, self._index["group"][rows])
            return torch.from_numpy(numbers), len(self.all_groups)
        warn_once(
            f"All {len(self)} pairs of the {self.folder.name} side have one source. Standard errors are computed "
            "between pairs and may be too small."
        )
        return torch.from_numpy(rows), len(self)

    def target_counts(self, rows: np.ndarray) -> np.ndarray:
        """Number of targets, including end-of-text, in each of the pairs `rows` (n,) int64."""
        return self._index["response"][rows].astype(np.int64)

    def token_counts(self, vocab_size: int) -> NDArray[np.int64]:
        """Count how often each token is a target: (V,)."""
        counts = np.zeros(vocab_size, np.int64)
        for start in range(0, len(self), COUNTED_AT_A_TIME):
            pairs = map(self.sequence, range(start, min(start + COUNTED_AT_A_TIME, len(self))))
            counts += np.bincount(np.concatenate([tokens[prompt:] for tokens, prompt in pairs]), minlength=vocab_size)
        return counts

    def sequence(self, row: int) -> tuple[np.ndarray, int]:
        """Return (token ids of prompt and response (L,) int64, prompt length) of one pair."""
        entry = self._index[row]
        start, prompt_length = int(entry["offset"]), int(entry["prompt"])
        return self._tokens[start : start + prompt_length + int(entry["response"])].astype(np.int64), prompt_length

    def references(self, rows: np.ndarray) -> list[str] | None:
        """Return the original target texts of the pairs `rows`; None if the folder has none."""
        return None if (self._index["reference"][rows] < 0).any() else self.texts(rows)[1]

    def texts(self, rows: np.ndarray) -> tuple[list[str], list[str]]:
        """Return the original (source texts, target texts) of the pairs `rows`; the folder must have them."""
        pairs = []
        with (self.folder / "references.jsonl").open("rb") as file:
            for row in rows:
                file.seek(int(self._index[row]["reference"]))
                pairs.append(json.loads(file.readline()))
        return [pair["source"] for pair in pairs], [pair["reference"] for pair in pairs]


def share_groups(files: list[PairFile]) -> None:
    """Number the document groups of several files together; one source file may have pairs in several."""
    known = np.unique(np.concatenate([file.all_groups for file in files]))
    for file in files:
        file._all_groups = known
