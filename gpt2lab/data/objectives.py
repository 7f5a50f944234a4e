"""Objectives: what is predicted from what. Turns samples of text into the batch that a step trains on.

Shapes: B samples of one micro-batch, T positions.

    clm              each token from those before it
    prefix_lm        the source sees itself both ways, the target is predicted as in clm (T5, Raffel et al. 2020)
    mlm              hidden tokens from all others (BERT, Devlin et al. 2019)
    fim              as clm, on documents whose middle was moved to their end (Bavarian et al. 2022, arXiv 2207.14255)
    sampled_softmax  clm, trained on a few entries of the vocabulary (gpt2lab/losses/sampled_softmax.py)

All that is random is a pure function of a seed and a sample's draw number: in training its place in the endless stream,
so that every epoch draws anew, and a resumed run what an unbroken one draws; in validation its number in the file.
"""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt2lab.data.batch import IGNORE_INDEX, Batch
from gpt2lab.data.data_order import uniforms
from gpt2lab.data.fim import rearranged
from gpt2lab.data.special_tokens import Marks
from gpt2lab.model.attention_masks import document_bounds, spans_of
from gpt2lab.settings import ObjectiveSettings

MASKED, RANDOM = 0.8, 0.1  # of the chosen tokens; the rest are left as they are
STRIDE = 2**16  # draws of one sample


class Objective:
    """What windows of running text become. The default changes nothing.

    Args:
        marks: of the tokenizer, for mlm and fim.
        end_of_text: begins each document; given, documents in one window do not see each other.
        seed: decides what is drawn.
    """

    def __init__(
        self,
        settings: ObjectiveSettings,
        marks: Marks | None = None,
        *,
        end_of_text: int | None = None,
        seed: int = 0,
    ) -> None:
        self.settings = settings
        self.marks = marks
        self.end_of_text = end_of_text
        self.seed = seed

    def target_counts(self, counts: NDArray[np.int64], length: int, draws: NDArray[np.int64]) -> NDArray[np.int64]:
        """Targets of each window (B,).

        Args:
            counts: (B,) next tokens that a window holds.
            length: T of a whole window.
            draws: (B,) draw numbers.
        """
        if self.settings.kind.fills_masks:
            return self._chosen(np.minimum(counts + 1, length))
        if self.settings.kind.bidirectional_prompt:
            return counts - self._prefixes(counts, draws) + 1
        return counts

    def __call__(self, batch: Batch, draws: NDArray[np.int64]) -> Batch:
        """The windows of `batch`, which have next tokens as labels, as this objective reads them.

        Args:
            draws: (B,) draw numbers.
        """
        kind = self.settings.kind
        counts = (batch.labels != IGNORE_INDEX).sum(1).numpy()  # (B,)
        if kind.infills:
            batch = self._rearranged(batch, counts, draws)
        # Before any is hidden; −1 is no token
        starts = batch.input_ids == (-1 if self.end_of_text is None else self.end_of_text)
        both_ways: Tensor | int = 0
        if kind.fills_masks:
            lengths = np.minimum(counts + 1, batch.labels.shape[1])
            batch, both_ways = self._masked(batch, lengths, draws), torch.from_numpy(lengths)[:, None]
        elif kind.bidirectional_prompt:
            prefixes = torch.from_numpy(self._prefixes(counts, draws))[:, None]  # (B, 1)
            early = torch.arange(batch.labels.shape[1]) < prefixes - 1
            labels = batch.labels.masked_fill(early, IGNORE_INDEX)
            batch, both_ways = replace(batch, labels=labels, few_targets=True), prefixes - 1
        if self.end_of_text is None and kind.is_causal:
            return batch
        return replace(batch, spans=spans_of(*document_bounds(starts), both_ways))

    @property
    def _known_marks(self) -> Marks:
        assert self.marks is not None
        return self.marks

    def _uniforms(self, draws: NDArray[np.int64], count: int) -> NDArray[np.float64]:
        """(B, count) numbers in [0, 1)."""
        return uniforms(draws[:, None] * STRIDE + np.arange(count), self.seed)

    def _prefixes(self, counts: NDArray[np.int64], draws: NDArray[np.int64]) -> NDArray[np.int64]:
        """(B,) how many tokens are given before the first that is predicted: evenly from 1 to all but the last."""
        return 1 + (self._uniforms(draws, 1)[:, 0] * counts).astype(np.int64)

    def _chosen(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """(B,) how many of a window's tokens are predicted: always the same share, as in BERT's own data."""
        return np.maximum(np.rint(self.settings.mask_share * lengths).astype(np.int64), 1)

    def _masked(self, batch: Batch, lengths: NDArray[np.int64], draws: NDArray[np.int64]) -> Batch:
        """Labels are the tokens at the chosen places; there the input has the mask, a random entry or the token."""
        marks, (size, length) = self._known_marks, batch.input_ids.shape
        numbers = self._uniforms(draws, 3 * length).reshape(size, 3, length)
        rank = np.where(np.arange(length) < lengths[:, None], numbers[:, 0], 2.0).argsort(1).argsort(1)
        chosen = torch.from_numpy(rank < self._chosen(lengths)[:, None])  # (B, T)
        how, entry = torch.from_numpy(numbers[:, 1]), torch.from_numpy((numbers[:, 2] * marks.entries).astype(np.int64))
        instead = torch.where(how < MASKED, marks.mask, torch.where(how < MASKED + RANDOM, entry, batch.input_ids))
        return replace(
            batch,
            input_ids=torch.where(chosen, instead, batch.input_ids),
            labels=torch.where(chosen, batch.input_ids, IGNORE_INDEX),
            few_targets=True,
        )

    def _rearranged(self, batch: Batch, counts: NDArray[np.int64], draws: NDArray[np.int64]) -> Batch:
        """Each document of a window, in a share of the cases, with its middle last."""
        tokens = torch.cat([batch.input_ids[:, :1], batch.labels], dim=1).numpy().copy()  # (B, T + 1)
        for row, (count, draw) in enumerate(zip(counts, draws, strict=True)):
            random = self._uniforms(np.array([draw]), 4 * (count + 1))[0].reshape(-1, 4)
            tokens[row, : count + 1] = rearranged(tokens[row, : count + 1], random, self._known_marks, self.settings)
        labels = torch.from_numpy(tokens[:, 1:])
        input_ids = torch.from_numpy(np.where(tokens == IGNORE_INDEX, 0, tokens)[:, :-1])
        return replace(batch, input_ids=input_ids.contiguous(), labels=labels.contiguous())
