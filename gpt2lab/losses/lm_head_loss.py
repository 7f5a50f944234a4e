"""LM-head loss: hidden states, head weight and labels to loss sums, chunk by chunk, without the whole batch's logits.

Shapes: N positions (B·T flattened), D hidden width, V vocabulary size, C rows of one chunk; V' is V, padded on a GPU
with rows of weight 0. The logits of these rows and their gradients are 0, and the softmax leaves them out.

The logits (C, V) of a chunk exist only while that chunk is processed. Their gradient has a closed form: the forward
pass writes it over the logits and multiplies it out to the gradients of hidden states and head weight. The backward
pass only scales these two. Cross-entropy and divergence share one pass of the student over the chunk. Matrix products
use whole chunks; the losses are computed in smaller blocks, whose intermediate results fit a CPU's cache.

Gradient per position, with q the student's probabilities at temperature 1, y the label and lse = logsumexp(logits):
    cross-entropy with label smoothing ε and z-loss c     q − (1 − ε) 1_y − ε / V + 2 c lse q
    divergence (gpt2lab/losses/divergences.py)            its gradient / T, times T² where scale_t2
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from gpt2lab.data.batch import IGNORE_INDEX
from gpt2lab.losses.chunk_losses import ChunkFunction, chunk_function
from gpt2lab.losses.logit_chunks import Head, even_chunk_rows, rows_of_a_block, transposed
from gpt2lab.losses.teacher_signal import TeacherChunk, TeacherSignal
from gpt2lab.settings import PLAIN_CROSS_ENTROPY, CrossEntropySettings, LossSettings
from gpt2lab.system.device import compute_dtype

BYTES_OF_A_CHUNK = 2**28  # of the student's logits, which three matrix products use
ROWS_OF_A_TEACHER = 256  # rows of one product with a teacher's head on a CPU; a GPU takes the whole chunk


@dataclass(frozen=True)
class LMHeadLoss:
    """Sums over the target positions, in nats. Divide by the global number of targets, not by `tokens` of this call."""

    total: Tensor  # () carries the gradient
    tokens: Tensor  # () int64: target positions
    cross_entropy: Tensor  # () detached; without label smoothing and z-loss
    divergence: Tensor  # () detached; scaled by T² where scale_t2; 0 without a teacher


@torch.compiler.disable  # chunks are compiled separately; the caller's graph breaks here
def lm_head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    teacher: TeacherSignal | None = None,
    loss: LossSettings | None = None,
    hard: CrossEntropySettings = PLAIN_CROSS_ENTROPY,
    mixing: Tensor | None = None,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
    compiled: bool = False,
) -> LMHeadLoss:
    """Compute cross-entropy, or hard_weight · cross-entropy + (1 − hard_weight) · divergence(teacher, student).

    The result does not depend on `chunk_rows`. Under autocast the matrix products run in its dtype; probabilities,
    losses and the accumulated weight gradient stay in fp32. Second derivatives are not available.

    Args:
        hidden: (N, D) student hidden states after the final layer norm.
        weight: (V, D) student head. Both heads are truncated to `vocab_size`, or to the teacher's vocabulary size if
            smaller, so that padding is in no softmax.
        labels: (N,) int64 below the smaller vocabulary size; IGNORE_INDEX at positions without a target.
        teacher: requires `loss`; without a teacher the loss is plain cross-entropy. `teacher.check` defines the losses
            that this kind of teacher supports.
        hard: label smoothing and z-loss of the cross-entropy.
        mixing: () TAID's teacher share.
        chunk_rows: C; by default the logits of a chunk take BYTES_OF_A_CHUNK, in chunks of equal size.
        compiled: run the work on a chunk's logits through torch.compile.

    Raises:
        ValueError: a teacher without loss settings, a teacher that does not support this loss, or shapes that differ.

    Source: closed-form softmax gradients; T² as in Hinton et al. 2015 (arXiv 1503.02531); z-loss as in PaLM
    (arXiv 2204.02311).
    """
    if hidden.shape[0] != labels.shape[0]:
        raise ValueError(f"hidden has {hidden.shape[0]} rows, labels {labels.shape[0]}; they must be equal.")
    if (teacher is None) != (loss is None):
        raise ValueError("teacher and loss settings are used together: give both or neither.")
    if teacher is not None and loss is not None:
        teacher.check(loss)
    vocab_size = min(weight.shape[0], vocab_size or weight.shape[0])
    if teacher is not None:
        vocab_size = teacher.shared_vocabulary(vocab_size)
    kept = labels != IGNORE_INDEX  # (N,)
    total, cross_entropy, distance = _ChunkedLoss.apply(
        hidden,
        weight,
        labels,
        kept,
        teacher,
        loss,
        hard,
        compiled,
        mixing,
        vocab_size,
        chunk_rows or _rows_of_every_chunk(hidden.shape[0], vocab_size * compute_dtype(hidden).itemsize),
        torch.is_grad_enabled(),
    )
    return LMHeadLoss(total, kept.sum(), cross_entropy, distance)


def rows_of_a_chunk(rows: int, row_bytes: int) -> int:
    """Return C: the rows of equal chunks of at most BYTES_OF_A_CHUNK, with `row_bytes` of logits per row."""
    return even_chunk_rows(rows, row_bytes, BYTES_OF_A_CHUNK)


def _rows_of_every_chunk(rows: int, row_bytes: int) -> int:
    """Return at most rows_of_a_chunk: a divisor of `rows`, where up to a quarter more chunks allow that.

    A last chunk of another size would be compiled again.
    """
    chunk_rows = rows_of_a_chunk(rows, row_bytes)
    fewest = -(-rows // chunk_rows)
    for chunks in range(max(fewest, 1), fewest * 5 // 4 + 1):
        if rows % chunks == 0:
            return rows // chunks
    return chunk_rows


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        kept: Tensor,
        teacher: TeacherSignal | None,
        loss: LossSettings | None,
        hard: CrossEntropySettings,
        compiled: bool,
        mixing: Tensor | None,
        vocab_size: int,
        chunk_rows: int,
        gradients_enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = compute_dtype(hidden)
        prepare, add = _compiled_passes() if compiled else (transposed, _add)
        head = prepare(weight[:vocab_size], dtype)  # (D, V')
        read_teacher = teacher.reader(vocab_size, partial(_workspace_head, prepare, dtype)) if teacher else None
        # needs_input_grad is True under no_grad too, where validation would compute gradients that are not used.
        hidden_needs_gradient, weight_needs_gradient = (
            gradients_enabled and needs for needs in ctx.needs_input_grad[:2]
        )
        needs_gradient = hidden_needs_gradient or weight_needs_gradient
        term = teacher.term if teacher else None
        work: ChunkFunction = chunk_function(term, loss, hard, needs_gradient, compiled)
        accumulate_dtype = torch.promote_types(torch.float32, weight.dtype)
        sums = torch.zeros(3, dtype=accumulate_dtype, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if hidden_needs_gradient else None
        weight_gradient = torch.zeros_like(weight, dtype=accumulate_dtype) if weight_needs_gradient else None  # (V, D)

        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            chunk = hidden[rows].to(dtype)  # (C, D)
            gradient = _logits(chunk, head, "student")  # (C, V'), replaced in place by their gradient
            logits = gradient[:, :vocab_size]
            for block, teacher_block in _blocks(logits, start, read_teacher):
                positions = slice(start + block.start, start + block.stop)
                sums += work(logits[block], labels[positions], kept[positions], teacher_block, mixing)
            if not needs_gradient:
                continue
            if hidden_gradient is not None:
                hidden_gradient[rows] = gradient @ head.T
            if weight_gradient is not None and weight_gradient.dtype == dtype:
                weight_gradient[:vocab_size].addmm_(logits.T, chunk)
            elif weight_gradient is not None:
                add(weight_gradient[:vocab_size], _outer_product(gradient, chunk)[:vocab_size])
            del gradient, logits  # before the next chunk allocates as much

        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.weight_dtype = weight.dtype
        total, cross_entropy, distance = (part.clone() for part in sums)
        ctx.mark_non_differentiable(cross_entropy, distance)
        return total, cross_entropy, distance

    @staticmethod
    def backward(ctx: Any, total_gradient: Tensor, *_of_detached: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        if hidden_gradient is not None:
            hidden_gradient = (hidden_gradient * total_gradient).to(hidden_gradient.dtype)
        if weight_gradient is not None:
            weight_gradient = (weight_gradient * total_gradient).to(ctx.weight_dtype)
        return hidden_gradient, weight_gradient, *(None,) * 10


def _workspace_head(prepare: Callable[[Tensor, torch.dtype], Tensor], dtype: torch.dtype, weight: Tensor) -> Head:
    """Return the product with a teacher's head (V, Dt); on a CPU the next call overwrites the logits."""
    head, vocab_size = prepare(weight, dtype), len(weight)  # (Dt, V')
    return lambda hidden: _logits(hidden.to(dtype), head, "teacher")[:, :vocab_size]


_workspaces: dict[tuple[str, torch.dtype], Tensor] = {}


def _logits(hidden: Tensor, head: Tensor, role: str) -> Tensor:
    """Compute (C, D), (D, V') → (C, V'); on a CPU in a workspace that the next chunk's logits overwrite.

    Freeing this largest allocation of a step after each chunk would fragment the system allocator's memory.
    """
    if hidden.device.type != "cpu":
        return hidden @ head
    rows, columns = hidden.shape[0], head.shape[1]
    workspace = _workspaces.get((role, head.dtype))
    if workspace is None or workspace.numel() < rows * columns:
        with torch.inference_mode(False):  # else a later training step could not write to it
            workspace = _workspaces[role, head.dtype] = head.new_empty(rows * columns)
    return torch.mm(hidden, head, out=workspace[: rows * columns].view(rows, columns))


def _blocks(
    logits: Tensor, start: int, read_teacher: Callable[[slice], TeacherChunk] | None
) -> Iterator[tuple[slice, TeacherChunk]]:
    """Yield (rows, what the teacher has for them) of the rows of a chunk (C, V) that are processed together.

    Args:
        start: position of the chunk's first row.
        read_teacher: reads positions of the teacher; on a CPU a few at a time.
    """
    rows = len(logits)
    for part in _slices(rows, ROWS_OF_A_TEACHER if logits.device.type == "cpu" else rows):
        read = read_teacher(slice(start + part.start, start + part.stop)) if read_teacher else ()
        for block in _slices(part.stop - part.start, rows_of_a_block(logits)):
            yield slice(part.start + block.start, part.start + block.stop), tuple(tensor[block] for tensor in read)


def _slices(rows: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _outer_product(gradient: Tensor, chunk: Tensor) -> Tensor:
    """Compute gradientᵀ · chunk: (C, V'), (C, D) → (V', D). A CPU copies the left factor, so it is the smaller one."""
    if chunk.device.type == "cuda":
        return gradient.T @ chunk
    return (chunk.T.contiguous() @ gradient).T


def _add(total: Tensor, summand: Tensor) -> None:
    total.add_(summand)


@cache
def _compiled_passes() -> tuple[Callable[[Tensor, torch.dtype], Tensor], Callable[[Tensor, Tensor], None]]:
    """Compile both to one pass over memory instead of two or three; importing the compiler takes a second."""
    return torch.compile(transposed), torch.compile(_add)
