"""Sides of benchmark_lm_head_loss.py: implementations of the LM-head loss, used as their authors recommend.

Shapes: N positions, D hidden width, V vocabulary. A side takes HeadInputs, under autocast for bf16, and returns the sum
of the losses, a scalar with gradient.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2lab.losses.dense_teacher import DenseTeacher
from gpt2lab.losses.lm_head_loss import lm_head_loss
from gpt2lab.settings import LossSettings

OURS, EAGER = "lm_head_loss", "dense, eager"
FORWARD_KL = LossSettings("forward_kl", temperature=1.0, hard_weight=0.0)


@dataclass(frozen=True)
class Head:
    """Loss and sizes of a measurement."""

    loss: str  # cross_entropy or forward_kl
    precision: str  # fp32 or bf16
    width: int  # D, also of the teacher
    rows: int  # N
    vocab_size: int  # V


@dataclass(frozen=True)
class HeadInputs:
    """Inputs of a side; the teacher's tensors have the dtype of its forward pass, as in a distillation run."""

    hidden: Tensor  # (N, D) fp32, requires_grad
    weight: Tensor  # (V, D) fp32, requires_grad
    labels: Tensor  # (N,)
    teacher: DenseTeacher | None


Side = Callable[[HeadInputs], Tensor]


def make_inputs(head: Head, device: torch.device) -> HeadInputs:
    random = torch.Generator().manual_seed(0)

    def normal(rows: int, scale: float) -> Tensor:
        return (scale * torch.randn(rows, head.width, generator=random)).to(device)

    hidden, weight = normal(head.rows, 1.0), normal(head.vocab_size, 0.02)
    labels = torch.randint(head.vocab_size, (head.rows,), generator=random).to(device)
    teacher = None
    if head.loss == "forward_kl":
        dtype = torch.bfloat16 if head.precision == "bf16" else torch.float32
        teacher = DenseTeacher(normal(head.rows, 1.0).to(dtype), normal(head.vocab_size, 0.02).to(dtype))
    return HeadInputs(hidden.requires_grad_(), weight.requires_grad_(), labels, teacher)


def missing_packages() -> list[str]:
    """Return the packages of other sides that are not installed here."""
    return [name for name in ("trl", "liger_kernel") if importlib.util.find_spec(name) is None]


def sides(head: Head, device: torch.device, compiles: bool) -> dict[str, Side]:
    """Return the sides available for this loss on this machine; without a C++ compiler none is compiled."""
    found: dict[str, Side] = {OURS: lambda inputs: ours(inputs, compiles), EAGER: dense}
    if compiles:
        found["dense, compiled"] = compiled_dense()
    if head.loss == "cross_entropy" and "linear_cross_entropy" in dir(F):  # PyTorch 2.13
        found["F.linear_cross_entropy"] = torch_chunked
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        found["Liger"] = liger
    if head.loss == "forward_kl" and importlib.util.find_spec("trl"):
        found["TRL"] = trl
    return found


def ours(inputs: HeadInputs, compiled: bool) -> Tensor:
    loss = FORWARD_KL if inputs.teacher else None
    result = lm_head_loss(
        inputs.hidden, inputs.weight, inputs.labels, teacher=inputs.teacher, loss=loss, compiled=compiled
    )
    return result.total


def dense(inputs: HeadInputs) -> Tensor:
    """Compute the loss from all logits at once, with probabilities in fp32."""
    if inputs.teacher is None:
        return dense_cross_entropy(inputs.hidden, inputs.weight, inputs.labels)
    return dense_forward_kl(inputs.hidden, inputs.weight, inputs.teacher.hidden, inputs.teacher.weight)


def dense_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = hidden @ weight.T  # (N, V)
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def dense_forward_kl(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    log_q = F.log_softmax((hidden @ weight.T).float(), dim=-1)  # (N, V)
    log_p = F.log_softmax((teacher_hidden @ teacher_weight.T).float(), dim=-1)  # (N, V)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def compiled_dense() -> Side:
    cross_entropy, forward_kl = torch.compile(dense_cross_entropy), torch.compile(dense_forward_kl)

    def side(inputs: HeadInputs) -> Tensor:
        if inputs.teacher is None:
            return cross_entropy(inputs.hidden, inputs.weight, inputs.labels)
        return forward_kl(inputs.hidden, inputs.weight, inputs.teacher.hidden, inputs.teacher.weight)

    return side


def torch_chunked(inputs: HeadInputs) -> Tensor:
    """Compute PyTorch's chunked loss with its default chunks; autocast does not apply to it."""
    hidden, weight = autocast(inputs.hidden), autocast(inputs.weight)
    chunks = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, inputs.labels, reduction="sum", options=chunks)


def liger(inputs: HeadInputs) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    hidden, weight = autocast(inputs.hidden), autocast(inputs.weight)
    if inputs.teacher is None:
        return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, inputs.labels)
    teacher = inputs.teacher
    mean = LigerFusedLinearJSD(jsd_beta=0.0)(hidden, weight, teacher.hidden, teacher.weight, inputs.labels)
    return mean * len(inputs.labels)


def trl(inputs: HeadInputs) -> Tensor:
    """Compute the loss of TRL's DistillationTrainer, in tiles; β = 0 is forward KL."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    assert inputs.teacher is not None
    mask = torch.ones(1, len(inputs.labels), device=inputs.labels.device)
    states = inputs.hidden.unsqueeze(0), inputs.teacher.hidden.unsqueeze(0)
    mean, *_ = _chunked_divergence_loss(*states, inputs.weight, inputs.teacher.weight, mask, 0.0)
    return mean * len(inputs.labels)


def autocast(tensor: Tensor) -> Tensor:
    """Cast to the dtype of autocast if it is enabled."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor
