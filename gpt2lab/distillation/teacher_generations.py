"""Teacher text: what a teacher wrote after the prompts of a training set, written once for all of its students.

    ids.bin      (S, max_new_tokens) token ids; of each of the S samples as many count as were written
    lengths.bin  int32 (S,): tokens written, end-of-text included; 0: none yet
    key.json     what the text depends on; its hash is in the folder's name

Ids are on the disk before their lengths are, so whatever kills the writer, the next one goes on where it stopped.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import GPT2LMHeadModel

from gpt2lab.data.batch import Batch
from gpt2lab.data.token_file import token_dtype
from gpt2lab.distillation.generation_batches import Writer, Written, collate
from gpt2lab.distillation.teacher_cache import Samples
from gpt2lab.storage.atomic_files import flush


class TeacherText:
    """A training set whose text after the prompts is the teacher's.

    Args:
        folder: of the files.
        samples: where the prompts are from.
        writer: how the teacher writes.
    """

    def __init__(self, folder: Path, samples: Samples, writer: Writer) -> None:
        self.samples = samples
        self.writer = writer
        self._ids_file, self._lengths_file = folder / "ids.bin", folder / "lengths.bin"
        self._token = token_dtype(writer.entries)

    def create(self) -> None:
        """Make the files, empty, unless they are there with the sizes they should have."""
        sizes = {
            self._ids_file: len(self) * self.writer.max_new_tokens * self._token.itemsize,
            self._lengths_file: len(self) * 4,
        }
        if all(file.is_file() and file.stat().st_size == size for file, size in sizes.items()):
            return
        for file, size in sizes.items():
            with file.open("wb") as stream:
                stream.truncate(size)
            flush(file)

    def missing(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of the samples `rows` for which nothing is written yet, in ascending order."""
        return np.unique(rows[self.target_counts(rows) == 0])

    def write(self, batches: Iterable[Batch], model: GPT2LMHeadModel) -> None:
        """Let the model write after the prompts of the batches."""
        width = self.writer.max_new_tokens * self._token.itemsize
        with self._ids_file.open("r+b") as ids, self._lengths_file.open("r+b") as lengths:
            for batch in batches:
                written = self.writer.write(model, batch)
                for one in written:  # a full disk raises here, where writing to a memory map would kill the process
                    ids.seek(one.sample * width)
                    ids.write(np.array(one.text, self._token).tobytes())
                ids.flush()
                os.fsync(ids.fileno())
                for one in written:
                    lengths.seek(one.sample * 4)
                    lengths.write(np.array(len(one.text), "<i4").tobytes())
                lengths.flush()

    def __len__(self) -> int:
        return len(self.samples)

    def target_counts(self, rows: NDArray[np.int64], keys: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Tokens that were written for each of the samples `rows`."""
        return np.memmap(self._lengths_file, "<i4", mode="r")[rows].astype(np.int64)

    def batch(self, rows: NDArray[np.int64], target_tokens: int, keys: NDArray[np.int64] | None = None) -> Batch:
        """The samples `rows`, written before, as one micro-batch."""
        shape = (len(self), self.writer.max_new_tokens)
        ids = np.memmap(self._ids_file, self._token, mode="r", shape=shape)[rows]  # (B, max_new_tokens)
        prompts = self.writer.prompts(self.samples.batch(rows, 0))
        parts = zip(rows.tolist(), prompts, ids.tolist(), self.target_counts(rows).tolist(), strict=True)
        written = [Written(sample, prompt, text[:length]) for sample, prompt, text, length in parts]
        return collate(written, target_tokens, self.writer)
