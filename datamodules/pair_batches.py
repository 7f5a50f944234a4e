"""Micro-batches of pairs: only responses are targets, rows are padded to the longest of the batch."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from gpt2lab.data.batch import Batch, PairTokens, pack_pairs, pad_pairs
from gpt2lab.data.pair_file import PairFile


@dataclass(frozen=True)
class PairSamples:
    """Samples of one side of the split, collated with padding or packing."""

    file: PairFile
    context: int
    pad_id: int
    with_references: bool
    bidirectional: bool = False  # whether attention within prompts is bidirectional
    packing: bool = False  # several pairs in a row

    def __len__(self) -> int:
        return len(self.file)

    def numbered_tokens(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (number, tokens of prompt and response) of each of the S pairs, (S,) both."""
        return self.file.numbers.astype(np.int64), self.file.lengths

    def target_counts(self, rows: NDArray[np.int64], keys: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        return self.file.target_counts(rows)

    def batch(self, rows: NDArray[np.int64], target_tokens: int, keys: NDArray[np.int64] | None = None) -> Batch:
        pairs = [self._pair(row) for row in rows.tolist()]
        batch = pad_pairs(
            pack_pairs(pairs, self.context) if self.packing else [[pair] for pair in pairs],
            target_tokens=target_tokens,
            context=self.context,
            pad_id=self.pad_id,
            bidirectional=self.bidirectional,
            packing=self.packing,
        )
        if keys is None:
            batch.documents = self.file.document_groups(batch.indices.numpy())
        if self.with_references:
            batch.references = self.file.references(rows)
        return batch

    def _pair(self, row: int) -> PairTokens:
        tokens, prompt_length = self.file.sequence(row)
        return PairTokens(torch.from_numpy(tokens), prompt_length, row)
