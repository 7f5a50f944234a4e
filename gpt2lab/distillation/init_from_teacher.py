"""Student initialization: initial weights of a student by layer and width pruning of its teacher.

    teacher + calibration text → importance of channels, heads, neurons → kept parts → student

The student keeps evenly spaced layers. With the teacher's width it copies whole layers and needs no text. A narrower
student keeps the parts with the largest activations on the calibration text, as in Minitron (Muralidharan et al. 2024,
arXiv 2407.14679). Hidden channels are ranked by their mean absolute activation after the layer norms, summed over all
layer norms since the residual stream is shared. In each layer, heads are ranked by the mean L2 norm of their output and
MLP neurons by their mean absolute activation.

Shapes: B sequences, T positions, D hidden width, H heads, F = 4 · D neurons; Ds, Hs, Fs are those of the student.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gpt2lab.data.batch import IGNORE_INDEX, Batch
from gpt2lab.model.backbone import Backbone, backbone_from_state
from gpt2lab.model.student_shape import check_fits, kept_layers
from gpt2lab.settings import ModelShape

CALIBRATION_SAMPLES = 32  # windows or pairs


@dataclass(frozen=True)
class Importance:
    """Importance of a teacher's parts: their mean activation, fp64 on the CPU.

    Attributes:
        channels: (D,).
        heads: (H,) per layer.
        neurons: (F,) per layer.
        norms: (2, D) per layer norm, by name: mean and mean square of its normalized input, before gain and bias.
    """

    channels: Tensor
    heads: list[Tensor]
    neurons: list[Tensor]
    norms: dict[str, Tensor]


@dataclass(frozen=True)
class Kept:
    """Indices of the teacher's parts that the student keeps, in ascending order, int64 on the CPU.

    Attributes:
        layers: index of the teacher's layer, per student layer.
        channels: (Ds,).
        heads: (Hs,) per student layer.
        neurons: (Fs,) per student layer.
    """

    layers: list[int]
    channels: Tensor
    heads: list[Tensor]
    neurons: list[Tensor]


def student_from_teacher(teacher: Backbone, shape: ModelShape, batches: Iterable[Batch]) -> Backbone:
    """Return a student initialized from its teacher, on the CPU.

    Args:
        teacher: in evaluation mode, on any device.
        shape: shape of the student.
        batches: calibration text, the same on all ranks; read only if the student is narrower.

    Raises:
        InputError: the student cannot be initialized from this teacher.
    """
    check_fits(teacher.shape, shape)
    if shape.n_embd == teacher.shape.n_embd:
        return prune(teacher, shape, keep_width(teacher.shape, shape))
    importance = measure_importance(teacher, batches)
    kept = keep_strongest(teacher.shape, shape, importance)
    student = prune(teacher, shape, kept)
    _correct_layer_norms(student, kept, importance.norms)
    return student


def keep_width(teacher: ModelShape, shape: ModelShape) -> Kept:
    """Return the indices of evenly spaced whole layers."""
    layers = kept_layers(teacher.n_layer, shape.n_layer)
    channels, heads, neurons = (
        torch.arange(count, device="cpu") for count in (teacher.n_embd, teacher.n_head, 4 * teacher.n_embd)
    )
    return Kept(layers, channels, [heads] * len(layers), [neurons] * len(layers))


def keep_strongest(teacher: ModelShape, shape: ModelShape, importance: Importance) -> Kept:
    """Return the most important channels, and heads and neurons of each kept layer; ties keep the first."""

    def strongest(values: Tensor, count: int) -> Tensor:
        return values.argsort(descending=True, stable=True)[:count].sort().values

    layers = kept_layers(teacher.n_layer, shape.n_layer)
    return Kept(
        layers,
        channels=strongest(importance.channels, shape.n_embd),
        heads=[strongest(importance.heads[layer], shape.n_head) for layer in layers],
        neurons=[strongest(importance.neurons[layer], 4 * shape.n_embd) for layer in layers],
    )


@torch.no_grad()
def measure_importance(teacher: Backbone, batches: Iterable[Batch]) -> Importance:
    """Measure importance on the text, without padding."""
    sums: dict[str, Tensor] = {}
    real = torch.empty(0)  # (B, T) bool: positions of the current batch that are not padding

    def add(name: str, values: Tensor) -> None:  # (B, T, …)
        total = values[real].sum(0).cpu().double()
        sums[name] = sums[name] + total if name in sums else total

    handles = _register_hooks(teacher, add)
    device, tokens = teacher.lm.transformer.wte.weight.device, 0
    try:
        for batch in batches:
            # Positions after the last target are padding.
            real = (batch.labels != IGNORE_INDEX).flip(1).cumsum(1).flip(1).bool().to(device)
            teacher(batch.input_ids.to(device), lambda hidden, weight: None, batch.spans_on(device))
            tokens += int(real.sum())
    finally:
        for handle in handles:
            handle.remove()
    norms = [name for name, module in teacher.lm.named_modules() if isinstance(module, nn.LayerNorm)]
    layers = range(teacher.shape.n_layer)
    return Importance(
        channels=torch.stack([sums[f"{name} output"] for name in norms]).sum(0) / tokens,
        heads=[sums[f"{layer} heads"] / tokens for layer in layers],
        neurons=[sums[f"{layer} neurons"] / tokens for layer in layers],
        norms={name: torch.stack([sums[f"{name} mean"], sums[f"{name} square"]]) / tokens for name in norms},
    )


def _register_hooks(teacher: Backbone, add: Callable[[str, Tensor], None]) -> list[RemovableHandle]:
    """Register hooks that pass the activations of layer norms, attention heads and MLP neurons to `add`."""

    def of_norm(name: str, module: nn.LayerNorm, inputs: tuple[Tensor], output: Tensor) -> None:
        normalized = nn.functional.layer_norm(inputs[0], module.normalized_shape, eps=module.eps)  # (B, T, D)
        add(f"{name} output", output.abs())
        add(f"{name} mean", normalized)
        add(f"{name} square", normalized.square())

    def of_heads(layer: int, _: nn.Module, inputs: tuple[Tensor]) -> None:  # (B, T, D), head after head
        add(f"{layer} heads", inputs[0].unflatten(-1, (teacher.shape.n_head, -1)).norm(dim=-1))

    def of_neurons(layer: int, _: nn.Module, inputs: tuple[Tensor]) -> None:  # (B, T, F), after GELU
        add(f"{layer} neurons", inputs[0].abs())

    handles = [
        module.register_forward_hook(partial(of_norm, name))
        for name, module in teacher.lm.named_modules()
        if isinstance(module, nn.LayerNorm)
    ]
    for layer, block in enumerate(teacher.lm.transformer.h):
        handles.append(block.attn.c_proj.register_forward_pre_hook(partial(of_heads, layer)))
        handles.append(block.mlp.c_proj.register_forward_pre_hook(partial(of_neurons, layer)))
    return handles


def prune(teacher: Backbone, shape: ModelShape, kept: Kept) -> Backbone:
    """Return a model of the kept parts with the teacher's weights, and its first tokens and positions."""
    source = teacher.lm.state_dict()
    state: dict[str, Tensor] = {}

    def copy(name: str, origin: str, *indices: Tensor) -> None:
        tensor = source[origin].detach().cpu()
        for dimension, index in enumerate(indices):
            tensor = tensor.index_select(dimension, index)
        state[name] = tensor

    channels = kept.channels
    for name, rows in (("wte", shape.vocab_size), ("wpe", shape.n_positions)):
        copy(f"transformer.{name}.weight", f"transformer.{name}.weight", torch.arange(rows, device="cpu"), channels)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    for name in ("transformer.ln_f.weight", "transformer.ln_f.bias"):
        copy(name, name, channels)
    for layer, original in enumerate(kept.layers):
        for module, indices in _kept_indices(teacher.shape, channels, kept.heads[layer], kept.neurons[layer]).items():
            to, origin = f"transformer.h.{layer}.{module}", f"transformer.h.{original}.{module}"
            copy(f"{to}.weight", f"{origin}.weight", *indices)
            copy(f"{to}.bias", f"{origin}.bias", indices[0])
    return backbone_from_state(state, shape)


def _kept_indices(
    teacher: ModelShape, channels: Tensor, heads: Tensor, neurons: Tensor
) -> dict[str, tuple[Tensor, ...]]:
    """Return the kept rows (outputs) and columns (inputs) of each module's weight in a block."""
    width = teacher.n_embd // teacher.n_head
    head_channels = (heads[:, None] * width + torch.arange(width, device="cpu")).flatten()  # (Ds,)
    query_key_value = torch.cat([head_channels + part * teacher.n_embd for part in range(3)])  # (3 · Ds,)
    return {
        "ln_1": (channels,),
        "attn.c_attn": (query_key_value, channels),
        "attn.c_proj": (channels, head_channels),
        "ln_2": (channels,),
        "mlp.c_fc": (neurons, channels),
        "mlp.c_proj": (channels, neurons),
    }


@torch.no_grad()
def _correct_layer_norms(student: Backbone, kept: Kept, norms: dict[str, Tensor]) -> None:
    """Restore the mean and variance of the kept channels by each layer norm's gain and bias.

    A layer norm over the kept channels alone gives them mean 0 and variance 1. The correction restores their mean and
    variance among all channels, averaged over the text. GPT-2 has a few channels of very large activations; without the
    correction, dropping one of them would scale up all others.
    """
    for name, module in student.lm.named_modules():
        if isinstance(module, nn.LayerNorm):
            path = name.split(".")  # transformer.h.0.ln_1 or transformer.ln_f
            if path[1] == "h":
                path[2] = str(kept.layers[int(path[2])])
            mean, square = norms[".".join(path)][:, kept.channels].mean(1).tolist()
            module.bias.add_(module.weight * mean)
            module.weight.mul_((square - mean**2) ** 0.5)
