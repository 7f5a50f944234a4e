"""Training objectives: convert windows of text into batches with inputs, labels and attention spans.

Shapes: B samples of one micro-batch, T positions.

    clm              predict each token from those before it
    prefix_lm        bidirectional attention in the prefix, the rest as in clm (T5, Raffel et al. 2020)
    mlm              predict masked tokens from all others (BERT, Devlin et al. 2019)
    fim              clm on documents with the middle moved to the end (Bavarian et al. 2022, arXiv 2207.14255)
    sampled_softmax  clm, trained on a sample of the vocabulary (gpt2lab/losses/sampled_softmax.py)

Randomness is a pure function of (seed, key of the sample). In training the key is the position in the endless stream,
so every epoch differs and a resumed run repeats an uninterrupted one; in validation it is the window's number.
"""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt2lab.data.batch import IGNORE_INDEX, Batch
from gpt2lab.data.data_order import uniforms
from gpt2lab.data.fim import rearrange_documents
from gpt2lab.data.special_tokens import SpecialTokens
from gpt2lab.model.attention_masks import document_bounds, make_spans
from gpt2lab.settings import ObjectiveSettings

MASKED, RANDOM = 0.8, 0.1  # shares of the chosen tokens; the rest stays unchanged
STRIDE = 2**16  # random numbers reserved for a sample


class Objective:
    """Conversion of windows of text to batches; clm leaves them unchanged.

    Args:
        special: special tokens, required for mlm and fim.
        end_of_text: first token of each document; if given, documents in one window do not attend to each other.
        seed: random seed.
    """

    def __init__(
        self,
        settings: ObjectiveSettings,
        special: SpecialTokens | None = None,
        *,
        end_of_text: int | None = None,
        seed: int = 0,
    ) -> None:
        self.settings = settings
        self.special = special
        self.end_of_text = end_of_text
        self.seed = seed

    def target_counts(self, counts: NDArray[np.int64], length: int, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of targets of each window (B,).

        Args:
            counts: (B,) number of next tokens in each window.
            length: T of a full window.
            keys: (B,) random keys of the samples.
        """
        if self.settings.kind.fills_masks:
            return self._masked_counts(np.minimum(counts + 1, length))
        if self.settings.kind.bidirectional_prompt:
            return counts - self._prefixes(counts, keys) + 1
        return counts

    def __call__(self, batch: Batch, keys: NDArray[np.int64]) -> Batch:
        """Convert a batch of windows whose labels are the next tokens.

        Args:
            keys: (B,) random keys of the samples.
        """
        kind = self.settings.kind
        counts = (batch.labels != IGNORE_INDEX).sum(1).numpy()  # (B,)
        if kind.infills:
            batch = self._rearrange(batch, counts, keys)
        # Before tokens are masked; −1 never occurs
        starts = batch.input_ids == (-1 if self.end_of_text is None else self.end_of_text)
        prefix_end: Tensor | int = 0
        if kind.fills_masks:
            lengths = np.minimum(counts + 1, batch.labels.shape[1])
            batch, prefix_end = self._mask(batch, lengths, keys), torch.from_numpy(lengths)[:, None]
        elif kind.bidirectional_prompt:
            prefixes = torch.from_numpy(self._prefixes(counts, keys))[:, None]  # (B, 1)
            early = torch.arange(batch.labels.shape[1]) < prefixes - 1
            labels = batch.labels.masked_fill(early, IGNORE_INDEX)
            batch, prefix_end = replace(batch, labels=labels, few_targets=True), prefixes - 1
        if self.end_of_text is None and kind.is_causal:
            return batch
        return replace(batch, spans=make_spans(*document_bounds(starts), prefix_end))

    @property
    def _special(self) -> SpecialTokens:
        assert self.special is not None
        return self.special

    def _uniforms(self, keys: NDArray[np.int64], count: int) -> NDArray[np.float64]:
        """Return (B, count) numbers in [0, 1)."""
        return uniforms(keys[:, None] * STRIDE + np.arange(count), self.seed)

    def _prefixes(self, counts: NDArray[np.int64], keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample prefix lengths (B,), uniform from 1 to all but the last token."""
        return 1 + (self._uniforms(keys, 1)[:, 0] * counts).astype(np.int64)

    def _masked_counts(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of predicted tokens of each window (B,): a fixed share, as in BERT's data."""
        return np.maximum(np.rint(self.settings.mask_share * lengths).astype(np.int64), 1)

    def _mask(self, batch: Batch, lengths: NDArray[np.int64], keys: NDArray[np.int64]) -> Batch:
        """Make random positions the targets; their input becomes the mask, a random token, or stays unchanged."""
        special, (size, length) = self._special, batch.input_ids.shape
        numbers = self._uniforms(keys, 3 * length).reshape(size, 3, length)
        rank = np.where(np.arange(length) < lengths[:, None], numbers[:, 0], 2.0).argsort(1).argsort(1)
        chosen = torch.from_numpy(rank < self._masked_counts(lengths)[:, None])  # (B, T)
        choice, token = torch.from_numpy(numbers[:, 1]), torch.from_numpy(numbers[:, 2] * special.vocab_size).long()
        masked = torch.where(choice < MASKED + RANDOM, token, batch.input_ids)
        masked = torch.where(choice < MASKED, special.mask, masked)
        return replace(
            batch,
            input_ids=torch.where(chosen, masked, batch.input_ids),
            labels=torch.where(chosen, batch.input_ids, IGNORE_INDEX),
            few_targets=True,
        )

    def _rearrange(self, batch: Batch, counts: NDArray[np.int64], keys: NDArray[np.int64]) -> Batch:
        """Move the middle of a share of the documents to their end."""
        tokens = torch.cat([batch.input_ids[:, :1], batch.labels], dim=1).numpy().copy()  # (B, T + 1)
        for row, (count, key) in enumerate(zip(counts, keys, strict=True)):
            random = self._uniforms(np.array([key]), 4 * (count + 1))[0].reshape(-1, 4)
            tokens[row, : count + 1] = rearrange_documents(
                tokens[row, : count + 1], random, self._special, self.settings
            )
        labels = torch.from_numpy(tokens[:, 1:])
        input_ids = torch.from_numpy(np.where(tokens == IGNORE_INDEX, 0, tokens)[:, :-1])
        return replace(batch, input_ids=input_ids.contiguous(), labels=labels.contiguous())
