"""LayerStats: log the gradient norm and the relative update of every layer.

layers/grad_norm/block_03       L2 norm of the gradient of block 3, before clipping
layers/update_ratio/block_03    L2 norm of the change of its weights in this step, over that of the weights
"""

import re
from typing import Any

import lightning
import torch
from lightning import Trainer
from torch import Tensor, nn

from gpt2lab.data.batch import Batch
from gpt2lab.optim.stochastic_rounding import to_local

PREFIX = "layers"
BLOCK = re.compile(r"\.h\.(\d+)\.")


class LayerStats(lightning.Callback):
    """Log both every `log_every` steps; a copy of the trained weights exists during these steps.

    A layer is a block, the embeddings, the final layer norm, or the projection to the teacher's width; weights that are
    not trained are left out.
    """

    def __init__(self) -> None:
        self._before: dict[str, list[Tensor]] = {}  # layer → this rank's part of its weights before the step
        self._gradients = torch.zeros(0)  # (layers,) sums of squares

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if (trainer.global_step + 1) % trainer.log_every_n_steps:
            return
        layers = trained_layers(pl_module.backbone)
        gradients = [[to_local(one.grad) for one in layer if one.grad is not None] for layer in layers.values()]
        self._gradients = _sums_of_squares(gradients, pl_module.device)
        self._before = {name: [to_local(one.detach()).clone() for one in layer] for name, layer in layers.items()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if not self._before or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        before, self._before = self._before, {}
        after = [[to_local(one.detach()) for one in layer] for layer in trained_layers(pl_module.backbone).values()]
        changes = [
            [new - old for new, old in zip(*pair, strict=True)] for pair in zip(after, before.values(), strict=True)
        ]
        squares = torch.stack(
            [
                self._gradients,
                _sums_of_squares(changes, pl_module.device),
                _sums_of_squares(before.values(), pl_module.device),
            ]
        )
        if pl_module.is_sharded:
            squares = pl_module.over_ranks(squares)
        gradient, change, weight = squares.sqrt().tolist()
        metrics = {f"{PREFIX}/grad_norm/{name}": value for name, value in zip(before, gradient, strict=True)}
        for name, moved, size in zip(before, change, weight, strict=True):
            metrics[f"{PREFIX}/update_ratio/{name}"] = moved / size if size else 0.0
        pl_module.log_measured(PREFIX, trainer.global_step, metrics)


def trained_layers(backbone: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return name of a layer → its trained parameters, in the order of the forward pass."""
    layers: dict[str, list[nn.Parameter]] = {}
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            layers.setdefault(_layer_of(name), []).append(parameter)
    return layers


def _layer_of(name: str) -> str:
    if match := BLOCK.search(name):
        return f"block_{int(match[1]):02d}"
    return "final_norm" if ".ln_f." in name else "projection" if "projection" in name else "embeddings"


def _sums_of_squares(layers: Any, device: torch.device) -> Tensor:
    """Return the sum of squares (layers,) of each list of tensors, in fp32."""
    sums = torch.zeros(len(layers), device=device)
    for number, tensors in enumerate(layers):
        for tensor in tensors:
            sums[number] += tensor.float().square().sum()
    return sums
