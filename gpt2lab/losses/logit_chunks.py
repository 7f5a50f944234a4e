"""Logit chunks: the logits of hidden states, a few rows at a time, for code without gradients.

Shapes: N positions, D hidden width, V vocabulary size, C rows of one chunk; V' is V, padded on a GPU. No (N, V) tensor
exists.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2lab.system.device import compute_dtype

LOGITS_OF_A_CHUNK = 2**23  # 32 MiB in fp32; several more tensors of this size exist while a chunk is evaluated
LOGITS_OF_A_BLOCK = 2**20  # on a CPU; the intermediate results fit its cache
GPU_ALIGNMENT = 64  # V is padded to a multiple of this on a GPU: unpadded, 50,257 logits took 30 of 35 ms

Head = Callable[[Tensor], Tensor]  # hidden states (C, D) → logits (C, V)


def logit_chunks(
    hidden: Tensor,
    weight: Tensor,
    *,
    most: int = LOGITS_OF_A_CHUNK,
    rows: int | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, logits (C, V)) of consecutive rows, without gradients; one empty chunk where there are no rows.

    Two chunks exist at a time unless the caller deletes the logits before the next iteration.

    Args:
        hidden: (N, D) hidden states after the final layer norm.
        weight: (V, D) head, without padding.
        most: maximum number of logits in a chunk; a single row may exceed it.
        rows: C, instead of `most`.
        dtype: dtype of the matrix product; by default `compute_dtype(hidden)` at the time of this call.
    """
    head = plain_head(weight, dtype or compute_dtype(hidden))
    step = rows or max(most // len(weight), 1)
    parts = (slice(start, start + step) for start in range(0, max(len(hidden), 1), step))
    return ((part, head(hidden[part])) for part in parts)


def rows_of_a_block(logits: Tensor) -> int:
    """Return how many rows of a chunk (C, V) to process together: on a CPU as many as fit its cache, on a GPU all."""
    rows, vocab_size = logits.shape
    return max(LOGITS_OF_A_BLOCK // vocab_size, 1) if logits.device.type == "cpu" else max(rows, 1)


def plain_head(weight: Tensor, dtype: torch.dtype) -> Head:
    """Return the matrix product with a head (V, D) in this dtype, independent of autocast and without gradients."""
    vocab_size = len(weight)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        matrix = transposed(weight, dtype)  # (D, V')

    @torch.no_grad()
    def logits(hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return (hidden.to(dtype) @ matrix)[:, :vocab_size]

    return logits


def transposed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert and transpose (V, D) to (D, V'), laid out for fast products.

    For a GPU, columns of zeros align V'. In bf16 a CPU multiplies by a contiguous matrix twice as fast as by a view.
    """
    if padding := padding_rows(weight):  # F.pad copies even without padding
        return F.pad(weight.to(dtype), (0, 0, 0, padding)).T
    matrix = weight.to(dtype).T
    return matrix.contiguous() if dtype.itemsize == 2 and weight.device.type == "cpu" else matrix


def padding_rows(weight: Tensor) -> int:
    """Return V' − V."""
    return -len(weight) % GPU_ALIGNMENT if weight.device.type == "cuda" else 0


def even_chunk_rows(rows: int, row_size: int, most: int) -> int:
    """Return the rows of equal chunks of at most `most`, with `row_size` per row."""
    chunks = -(-rows * row_size // most)
    return -(-rows // max(chunks, 1)) or 1
