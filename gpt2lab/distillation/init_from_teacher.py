"""Student initialisation: a student's first weights cut out of its teacher's — evenly spaced layers, made narrower.

    teacher + calibration text → importance of channels, heads, neurons → which of them are kept → student

A student of the teacher's width copies whole layers and needs no text. A narrower one keeps what answers most strongly
to the text, as Minitron does (Muralidharan et al. 2024, arXiv 2407.14679): hidden channels by their mean absolute
activation after the layer norms, summed over all of them because the residual stream is shared; in each layer heads by
the mean L2 norm of their output and MLP neurons by their mean absolute activation.

Shapes: B sequences, T positions, D hidden width, H heads, F = 4 · D neurons; Ds, Hs, Fs are the student's.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

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
    """How strongly the parts of a teacher answer, fp64 on the CPU.

    Attributes:
        channels: (D,).
        heads: (H,) for each layer.
        neurons: (F,) for each layer.
        norms: for each layer norm by its name (2, D): mean and mean square of what it has normalised, before gain and
            bias.
    """

    channels: Tensor
    heads: list[Tensor]
    neurons: list[Tensor]
    norms: dict[str, Tensor]


@dataclass(frozen=True)
class Kept:
    """Which parts of the teacher the student takes over, in ascending order, int64 on the CPU.

    Attributes:
        layers: for each of the student's layers the number of the teacher's.
        channels: (Ds,).
        heads: (Hs,) for each of the student's layers.
        neurons: (Fs,) for each of the student's layers.
    """

    layers: list[int]
    channels: Tensor
    heads: list[Tensor]
    neurons: list[Tensor]


def student_from_teacher(teacher: Backbone, shape: ModelShape, batches: Iterable[Batch]) -> Backbone:
    """The student with its first weights, on the CPU.

    Args:
        teacher: in evaluation mode, on any device.
        shape: the student's.
        batches: calibration text; on several ranks the same on each. Read only where the student is narrower.

    Raises:
        InputError: the student cannot be cut out of this teacher.
    """
    check_fits(teacher.shape, shape)
    if shape.n_embd == teacher.shape.n_embd:
        return cut_out(teacher, shape, keep_width(teacher.shape, shape))
    importance = measure_importance(teacher, batches)
    kept = keep_strongest(teacher.shape, shape, importance)
    student = cut_out(teacher, shape, kept)
    _keep_norms_in_place(student, kept, importance.norms)
    return student


def keep_width(teacher: ModelShape, shape: ModelShape) -> Kept:
    """Whole layers."""
    layers = kept_layers(teacher.n_layer, shape.n_layer)
    channels, heads, neurons = (
        torch.arange(count, device="cpu") for count in (teacher.n_embd, teacher.n_head, 4 * teacher.n_embd)
    )
    return Kept(layers, channels, [heads] * len(layers), [neurons] * len(layers))


def keep_strongest(teacher: ModelShape, shape: ModelShape, importance: Importance) -> Kept:
    """The most important channels, and in each kept layer heads and neurons; of equals the first."""

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
    """Run the teacher over the text; padding is left out."""
    sums: dict[str, Tensor] = {}
    real = torch.empty(0)  # (B, T) bool: which positions of the present batch are text

    def add(name: str, values: Tensor) -> None:  # (B, T, …)
        total = values[real].sum(0).cpu().double()
        sums[name] = sums[name] + total if name in sums else total

    handles = _listen(teacher, add)
    device, tokens = teacher.lm.transformer.wte.weight.device, 0
    try:
        for batch in batches:
            # Padding stands on the right of the last target.
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


def _listen(teacher: Backbone, add: Callable[[str, Tensor], None]) -> list[RemovableHandle]:
    """Have every layer norm, attention and MLP hand `add` how strongly it answers."""
    modules = dict(teacher.lm.named_modules())

    def norm_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.LayerNorm, inputs: tuple[Tensor], output: Tensor) -> None:
            normalised = nn.functional.layer_norm(inputs[0], module.normalized_shape, eps=module.eps)  # (B, T, D)
            add(f"{name} output", output.abs())
            add(f"{name} mean", normalised)
            add(f"{name} square", normalised.square())

        return hook

    def head_hook(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:  # (B, T, D), head after head
            add(f"{layer} heads", inputs[0].unflatten(-1, (teacher.shape.n_head, -1)).norm(dim=-1))

        return hook

    def neuron_hook(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:  # (B, T, F), after GELU
            add(f"{layer} neurons", inputs[0].abs())

        return hook

    handles = [
        module.register_forward_hook(norm_hook(name))
        for name, module in modules.items()
        if isinstance(module, nn.LayerNorm)
    ]
    for layer in range(teacher.shape.n_layer):
        block = f"transformer.h.{layer}"
        handles.append(modules[f"{block}.attn.c_proj"].register_forward_pre_hook(head_hook(layer)))
        handles.append(modules[f"{block}.mlp.c_proj"].register_forward_pre_hook(neuron_hook(layer)))
    return handles


def cut_out(teacher: Backbone, shape: ModelShape, kept: Kept) -> Backbone:
    """A model of the kept parts with the teacher's own weights. Its vocabulary and its positions are the first ones."""
    source = teacher.lm.state_dict()
    state: dict[str, Tensor] = {}

    def take(name: str, origin: str, *places: Tensor) -> None:
        tensor = source[origin].detach().cpu()
        for dimension, kept_there in enumerate(places):
            tensor = tensor.index_select(dimension, kept_there)
        state[name] = tensor

    channels = kept.channels
    for name, rows in (("wte", shape.vocab_size), ("wpe", shape.n_positions)):
        take(f"transformer.{name}.weight", f"transformer.{name}.weight", torch.arange(rows, device="cpu"), channels)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    for name in ("transformer.ln_f.weight", "transformer.ln_f.bias"):
        take(name, name, channels)
    for layer, original in enumerate(kept.layers):
        for module, places in _places(teacher.shape, channels, kept.heads[layer], kept.neurons[layer]).items():
            to, origin = f"transformer.h.{layer}.{module}", f"transformer.h.{original}.{module}"
            take(f"{to}.weight", f"{origin}.weight", *places)
            take(f"{to}.bias", f"{origin}.bias", places[0])
    return backbone_from_state(state, shape)


def _places(teacher: ModelShape, channels: Tensor, heads: Tensor, neurons: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """For each module of a block the kept rows (outputs) and, of a matrix, columns (inputs) of its weight."""
    width = teacher.n_embd // teacher.n_head
    of_heads = (heads[:, None] * width + torch.arange(width, device="cpu")).flatten()  # (Ds,) channels of kept heads
    query_key_value = torch.cat([of_heads + part * teacher.n_embd for part in range(3)])  # (3 · Ds,)
    return {
        "ln_1": (channels,),
        "attn.c_attn": (query_key_value, channels),
        "attn.c_proj": (channels, of_heads),
        "ln_2": (channels,),
        "mlp.c_fc": (neurons, channels),
        "mlp.c_proj": (channels, neurons),
    }


@torch.no_grad()
def _keep_norms_in_place(student: Backbone, kept: Kept, norms: dict[str, Tensor]) -> None:
    """Let each layer norm's gain and bias make up for the mean and the variance that left with the dropped channels.

    Over the kept channels alone the norm gives mean 0 and variance 1; here they get back what they had among all, on
    average over the text. Without it, dropping one loud channel, of which GPT-2 has a few, would blow up all others.
    """
    for name, module in student.lm.named_modules():
        if isinstance(module, nn.LayerNorm):
            place = name.split(".")  # transformer.h.0.ln_1 or transformer.ln_f
            if place[1] == "h":
                place[2] = str(kept.layers[int(place[2])])
            mean, square = norms[".".join(place)][:, kept.channels].mean(1).tolist()
            module.bias.add_(module.weight * mean)
            module.weight.mul_((square - mean**2) ** 0.5)
