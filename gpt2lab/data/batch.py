"""Batch: input of a training or validation step.

Shapes: B sequences of one micro-batch on one rank, T positions each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt2lab.model.attention_masks import document_bounds, make_spans
from gpt2lab.system.device import copied_to

IGNORE_INDEX = -100
MULTIPLE = 8  # tensor cores are faster with it, and fewer lengths compile to fewer kernels


@dataclass
class Batch:
    """One micro-batch, padded on the right with ignored labels.

    Without spans attention is causal, so no other position attends to padding.
    """

    input_ids: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64, target of each position, usually the next token; or IGNORE_INDEX
    target_tokens: int  # number of targets in the whole global batch of the optimizer step: all micro-batches and ranks
    indices: Tensor  # int64, position of each sample in the (training or validation) set; pairs may share a row
    prompt_lengths: Tensor | None = None  # int64, pairs only: each one's prompt tokens, in the order of indices
    references: list[str] | None = None  # (B,) pairs only: the target text, for metrics on generated text
    spans: Tensor | None = None  # (B, T, 2) int64, attention spans (attention_masks.py); None: causal
    few_targets: bool = False  # whether many positions have no target, so that skipping them in the head is faster
    on_policy: bool = False  # whether the student generated the text, so that its labels carry no information
    places: Tensor | None = None  # (B,) int64, in a validation: the place of each sample among those that it reads
    documents: Tensor | None = None  # (targets,) int64, row by row: the document group of each, for standard errors
    on_cpu: "Batch | None" = None  # what `to` another device was called on: reading back would wait for the device

    def pin_memory(self) -> "Batch":
        """Return the batch with what a device gets in pinned memory, which a GPU reads while it computes."""
        return replace(self, **{name: tensor.pin_memory() for name, tensor in self._read_by_device()})

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device. What only the CPU reads stays there. Replace labels before, not after."""
        moved = {name: tensor.to(device, non_blocking=device.type == "cuda") for name, tensor in self._read_by_device()}
        return replace(self, on_cpu=self.on_cpu or (None if device.type == "cpu" else self), **moved)

    def count_row_targets(self) -> Tensor:
        """Return the number of targets (B,) of each row, on the CPU."""
        return ((self.on_cpu or self).labels != IGNORE_INDEX).sum(1).cpu()

    def head_rows(self, multiple: int) -> Tensor:
        """Return the positions (n,) of B · T with a target, ascending, and with some others n is a multiple.

        On the device of the labels.
        """
        kept = (self.on_cpu or self).labels.flatten() != IGNORE_INDEX
        targets = kept.nonzero().squeeze(1)
        others = (~kept).nonzero().squeeze(1)[: -len(targets) % multiple]
        return copied_to(torch.cat([targets, others]).sort().values, self.labels.device)

    def _read_by_device(self) -> list[tuple[str, Any]]:
        tensors = {"input_ids": self.input_ids, "labels": self.labels, "spans": self.spans, "documents": self.documents}
        return [(name, tensor) for name, tensor in tensors.items() if tensor is not None]

    def spans_on(self, device: torch.device) -> Tensor | None:
        """Return the spans, moved to a device."""
        return None if self.spans is None else self.spans.to(device)


class Samples(Protocol):
    """One side of the split: numbered samples that are collated to batches."""

    def __len__(self) -> int: ...

    def target_counts(self, rows: NDArray[np.int64], keys: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Number of targets in each of the samples `rows`; random keys are `keys`, by default `rows`."""
        ...

    def batch(self, rows: NDArray[np.int64], target_tokens: int, keys: NDArray[np.int64] | None = None) -> Batch:
        """Collate the samples `rows`, at least one; without `keys` the batch contains document groups."""
        ...


class ValidationSamples(Samples, Protocol):
    """Samples that can be validated in part."""

    def numbered_tokens(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (number, tokens read) of each of the S samples, (S,) both; the number identifies the sample."""
        ...


@dataclass(frozen=True)
class PairTokens:
    """One pair as token ids."""

    tokens: Tensor  # (L,) prompt and response
    prompt_length: int
    index: int  # in the (training or validation) set


def pad_pairs(
    rows: Sequence[Sequence[PairTokens]],
    *,
    target_tokens: int,
    context: int,
    pad_id: int,
    bidirectional: bool = False,
    packing: bool = False,
) -> Batch:
    """Collate pairs into one micro-batch; only the responses are targets.

    Args:
        rows: B sequences of one pair each, or of several that do not attend to each other.
        context: maximum length; T is the longest row rounded up to a multiple of 8.
        target_tokens: see Batch.
        bidirectional: whether attention within a prompt, except for its last token, is bidirectional.
        packing: whether rows may contain several pairs; then all batches have spans and compile to one graph.
    """
    longest = max(sum(len(pair.tokens) - 1 for pair in row) for row in rows)
    length = min(-(-longest // MULTIPLE) * MULTIPLE, context)
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)  # (B, T)
    labels = torch.full((len(rows), length), IGNORE_INDEX, dtype=torch.int64)  # (B, T)
    starts = torch.zeros(len(rows), length, dtype=torch.bool)  # (B, T)
    ahead = torch.zeros(len(rows), length, dtype=torch.int64)  # (B, T)
    for index, row in enumerate(rows):
        start = 0
        for pair in row:
            end = start + len(pair.tokens) - 1
            input_ids[index, start:end] = pair.tokens[:-1]
            labels[index, start + pair.prompt_length - 1 : end] = pair.tokens[pair.prompt_length :]
            starts[index, start] = True
            if bidirectional:
                ahead[index, start:end] = start + pair.prompt_length - 1
            start = end
        starts[index, start:] = True  # padding attends only to itself
    pairs = [pair for row in rows for pair in row]
    causal = not bidirectional and not packing and len(pairs) == len(rows)
    return Batch(
        input_ids,
        labels,
        target_tokens,
        torch.tensor([pair.index for pair in pairs]),
        torch.tensor([pair.prompt_length for pair in pairs]),
        spans=None if causal else make_spans(*document_bounds(starts), ahead),
        few_targets=True,
    )


def pack_pairs(pairs: Sequence[PairTokens], context: int) -> list[list[PairTokens]]:
    """Pack pairs into rows of at most `context` positions by first-fit decreasing."""
    rows: list[list[PairTokens]] = []
    free: list[int] = []
    for pair in sorted(pairs, key=lambda pair: -len(pair.tokens)):
        size = len(pair.tokens) - 1
        row = next((row for row, positions in enumerate(free) if positions >= size), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(context)
        rows[row].append(pair)
        free[row] -= size
    return rows
