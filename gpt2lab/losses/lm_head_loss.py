"""LM-head loss: hidden states + head weight + targets → loss sum, chunk by chunk, without the whole batch's logits.

Shapes: N positions (B·T flattened), D hidden width, V vocabulary, C rows of one chunk; V' is V, padded on a GPU with
entries whose weights are 0: so are then their logits, and the gradient of these, which no softmax sees.

Each chunk's logits (C, V) live only while that chunk is worked on. Its gradient with respect to the logits is known in
closed form, so it is formed at once, in their place, and turned into the gradients of the hidden states and of the head
weight; backward then only scales those two. Cross-entropy and the teacher's divergence share the student's one pass
over the chunk. Matrix products like large chunks; what is computed of the logits goes over them in small blocks, whose
intermediate results stay in a CPU's cache.

Gradient per position, with q the student's probabilities at temperature 1, y the label and lse = logsumexp(logits):
    cross-entropy with label smoothing ε and z-loss c     q − (1 − ε) 1_y − ε / V + 2 c lse q
    divergence (gpt2lab/losses/divergences.py)                   its gradient / T, times T² where scale_t2
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2lab.data.batch import IGNORE_INDEX
from gpt2lab.losses.chunk_losses import ChunkFunction, chunk_function
from gpt2lab.losses.logit_chunks import Head, compute_dtype, even_chunk_rows, transposed
from gpt2lab.losses.teacher_signal import TeacherSignal
from gpt2lab.settings import PLAIN_CROSS_ENTROPY, CrossEntropySettings, LossSettings

BYTES_OF_A_CHUNK = 2**28  # of the student's logits, which three matrix products share
ROWS_OF_A_TEACHER = 256  # whose logits are in one product only; on a CPU, a GPU takes whole chunks
LOGITS_OF_A_BLOCK = 2**20  # on a CPU; a GPU takes whole chunks
GPU_ALIGNMENT = 64  # entries to whose multiple a GPU's logits are padded: at 50,257 they took 30 ms of 35


@dataclass(frozen=True)
class LMHeadLoss:
    """Sums over the target positions, in nats. Divide by the global number of targets, not by `tokens` of this call."""

    total: Tensor  # () carries the gradient
    tokens: Tensor  # () int64: positions that count
    cross_entropy: Tensor  # () detached; without label smoothing and z-loss
    divergence: Tensor  # () detached, with T² where scale_t2; 0 without a teacher


@torch.compiler.disable  # compiles its own chunks; a caller's graph breaks here
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
    ignore_index: int = IGNORE_INDEX,
    chunk_rows: int | None = None,
    compiled: bool = False,
) -> LMHeadLoss:
    """Cross-entropy, or hard_weight · cross-entropy + (1 − hard_weight) · divergence(teacher, student).

    The result does not depend on `chunk_rows`. Under autocast the matrix products run in its dtype; probabilities,
    losses and the accumulated weight gradient stay in fp32. Second derivatives are not available.

    Args:
        hidden: (N, D) student hidden states after the final layer norm.
        weight: (V, D) student head. A head padded with entries that mean no token is cut to `vocab_size`, or to the
            teacher's entries where those are fewer, and so is the teacher's: padding is in no softmax.
        labels: (N,) int64 below the smaller vocabulary; `ignore_index` marks positions that count neither as loss nor
            as token.
        teacher: needs `loss`; without it the loss is plain cross-entropy. `teacher.check` defines which losses a kind
            of teacher serves.
        hard: label smoothing and z-loss of the cross-entropy.
        mixing: () TAID's share of the teacher.
        chunk_rows: C; by default as many as BYTES_OF_A_CHUNK hold logits, in chunks of one size.
        compiled: run the work on a chunk's logits through torch.compile.

    Raises:
        ValueError: a teacher without loss settings, one that cannot serve this loss, or shapes that do not fit.

    Source: closed-form softmax gradients; T² as in Hinton et al. 2015 (arXiv 1503.02531); z-loss as in PaLM
    (arXiv 2204.02311).
    """
    if hidden.shape[0] != labels.shape[0]:
        raise ValueError(f"hidden has {hidden.shape[0]} rows, labels {labels.shape[0]}; they must be equal.")
    if (teacher is None) != (loss is None):
        raise ValueError("teacher and loss settings belong together: give both or neither.")
    if teacher is not None and loss is not None:
        teacher.check(loss)
    entries = min(weight.shape[0], vocab_size or weight.shape[0])
    if teacher is not None:
        entries = teacher.shared_vocabulary(entries)
    kept = labels != ignore_index  # (N,)
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
        entries,
        chunk_rows or rows_of_a_chunk(hidden.shape[0], entries * compute_dtype(hidden).itemsize),
        torch.is_grad_enabled(),
    )
    return LMHeadLoss(total, kept.sum(), cross_entropy, distance)


def rows_of_a_chunk(rows: int, row_bytes: int) -> int:
    """Return C: as many rows, with `row_bytes` of logits each, as BYTES_OF_A_CHUNK hold, in chunks of equal size."""
    return even_chunk_rows(rows, row_bytes, BYTES_OF_A_CHUNK)


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
        entries: int,
        chunk_rows: int,
        gradients_enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = compute_dtype(hidden)
        lay_out, add = _compiled_passes() if compiled else (_padded, _add)
        head = lay_out(weight[:entries], dtype)  # (D, V')
        read_teacher = teacher.reader(entries, partial(_workspace_head, lay_out, dtype)) if teacher else None
        # needs_input_grad holds under no_grad too, where validation would pay for gradients that nobody asks for.
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
            logits = gradient[:, :entries]
            for part in _slices(len(gradient), ROWS_OF_A_TEACHER if gradient.device.type == "cpu" else len(gradient)):
                read = read_teacher(slice(start + part.start, start + part.stop)) if read_teacher else ()
                for block in _blocks(logits[part]):
                    places = slice(start + part.start + block.start, start + part.start + block.stop)
                    of_block = tuple(tensor[block] for tensor in read)
                    sums += work(logits[part][block], labels[places], kept[places], of_block, mixing)
            if not needs_gradient:
                continue
            if hidden_gradient is not None:
                hidden_gradient[rows] = gradient @ head.T
            if weight_gradient is not None and weight_gradient.dtype == dtype:
                weight_gradient[:entries].addmm_(logits.T, chunk)
            elif weight_gradient is not None:
                add(weight_gradient[:entries], _outer_product(gradient, chunk)[:entries])
            del gradient, logits  # before the next chunk takes as much again

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


def _workspace_head(lay_out: Callable[[Tensor, torch.dtype], Tensor], dtype: torch.dtype, weight: Tensor) -> Head:
    """Return the product with a teacher's head (V, Dt); on a CPU the next product overwrites the logits."""
    head, entries = lay_out(weight, dtype), len(weight)  # (Dt, V')
    return lambda hidden: _logits(hidden.to(dtype), head, "teacher")[:, :entries]


_workspaces: dict[tuple[str, torch.dtype], Tensor] = {}


def _logits(hidden: Tensor, head: Tensor, whose: str) -> Tensor:
    """(C, D), (D, V') → (C, V'); on a CPU in memory that the next chunk's logits overwrite.

    It is by far the largest piece of a step: given back to the system allocator each time, its place breaks into parts.
    """
    if hidden.device.type != "cpu":
        return hidden @ head
    rows, entries = hidden.shape[0], head.shape[1]
    workspace = _workspaces.get((whose, head.dtype))
    if workspace is None or workspace.numel() < rows * entries:
        workspace = _workspaces[whose, head.dtype] = head.new_empty(rows * entries)
    return torch.mm(hidden, head, out=workspace[: rows * entries].view(rows, entries))


def _blocks(logits: Tensor) -> list[slice]:
    """Slices of the rows (C, V) that are worked on together."""
    rows, entries = logits.shape
    return _slices(rows, max(LOGITS_OF_A_BLOCK // entries, 1) if logits.device.type == "cpu" else max(rows, 1))


def _slices(rows: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _padded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(V, D) → (D, V')."""
    if padding := _padding(weight):  # F.pad copies where there is nothing to pad, too
        return F.pad(weight.to(dtype), (0, 0, 0, padding)).T
    return transposed(weight, dtype)


def _padding(weight: Tensor) -> int:
    """V' − V."""
    return -len(weight) % GPU_ALIGNMENT if weight.device.type == "cuda" else 0


def _outer_product(gradient: Tensor, chunk: Tensor) -> Tensor:
    """(C, V'), (C, D) → gradientᵀ · chunk (V', D). A CPU lays out the left side anew: chunk is the smaller one."""
    if chunk.device.type == "cuda":
        return gradient.T @ chunk
    return (chunk.T.contiguous() @ gradient).T


def _add(total: Tensor, summand: Tensor) -> None:
    total.add_(summand)


@cache
def _compiled_passes() -> tuple[Callable[[Tensor, torch.dtype], Tensor], Callable[[Tensor, Tensor], None]]:
    """In one pass over memory where the eager versions take two or three; importing the compiler takes a second."""
    return torch.compile(_padded), torch.compile(_add)
