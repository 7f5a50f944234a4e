"""Gradients of a few optimizer steps in float64, through the objects that train.py builds, for comparison in tests.

As a program, one rank of several: python gradient_run.py SPEC … trains the run that each SPEC, a config.yaml,
describes, one after the other in one process group. Its gradients are written beside it, to gradients.pt.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lightning
import torch
import torch.distributed
from lightning.pytorch.plugins import DoublePrecision
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from launch.config import run_spec
from launch.config.run_spec import PreparedSpec
from launch.run import build
from lightning_modules.distill import Distill

Gradients = list[dict[str, Tensor]]
Held = tuple[tuple[int, ...], int, bool]


class Recorder(lightning.Callback):
    """Stores the whole gradient of each step before clipping, with its micro-batches and dtypes."""

    def __init__(self) -> None:
        self.gradients: Gradients = []
        self.parts: list[tuple[int, int]] = []  # (sequences, targets) of each micro-batch on this rank
        self.computed_in: torch.dtype | None = None  # the dtype of a block's weights in its forward pass
        self.held: dict[str, Held] = {}
        self.moments_held = 0  # elements of the optimizer's state on this rank
        self.offloads: set[bool] = set()  # whether FSDP gathers shards of weights from the host
        self.roots: dict[str, list[str]] = {}  # student and teacher → root modules of FSDP

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        attention = pl_module.backbone.blocks[0].attn

        def look(module: torch.nn.Module, given: Any) -> None:
            self.computed_in = next(module.parameters()).dtype

        attention.register_forward_pre_hook(look)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.parts.append((len(batch.input_ids), int((batch.labels >= 0).sum())))

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        of_step = {}
        for name, parameter in pl_module.backbone.named_parameters():
            if parameter.grad is not None:
                gradient = parameter.grad
                of_step[name] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone().cpu()
        self.gradients.append(of_step)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        models = {"student": pl_module.backbone}
        if isinstance(pl_module, Distill) and not pl_module.cache:
            models["teacher"] = pl_module.teacher.backbone
        self.roots = {whose: roots(model) for whose, model in models.items()}
        self.offloads = offloads(pl_module.backbone)
        self.held = {
            f"{whose}.{name}": held(parameter)
            for whose, model in models.items()
            for name, parameter in model.named_parameters()
        }
        state = trainer.optimizers[0].state.values()
        self.moments_held = sum(held(tensor)[1] for of in state for tensor in of.values() if tensor.ndim)


def held(tensor: Tensor) -> Held:
    """Return the full shape of a tensor, the elements on this rank, and whether it is sharded."""
    here = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return tuple(tensor.shape), here.untyped_storage().nbytes() // here.itemsize, isinstance(tensor, DTensor)


def roots(model: nn.Module) -> list[str]:
    """Return the names of FSDP's root modules; none without FSDP."""
    split = {name: module for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    return [name for name, module in split.items() if module._get_fsdp_state()._is_root]


def offloads(model: nn.Module) -> set[bool]:
    """Return whether FSDP offloads its sharded parameters to the host; empty without FSDP."""
    split = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [group for state in split for group in state._fsdp_param_groups]
    return {parameter.offload_to_cpu for group in groups for parameter in group.fsdp_params}


def recorded(spec: PreparedSpec, folder: Path) -> Recorder:
    """Train in float64 for `precision=fp32`, without validation, checkpoints and reports.

    Args:
        folder: an empty one.
    """
    recorder = Recorder()
    is_exact = spec.machine.precision.name == "fp32"
    if is_exact:
        machine = replace(spec.machine, precision=replace(spec.machine.precision, teacher="float64"))
        spec = replace(spec, resolved=replace(spec.resolved, machine=machine))
    data = build.data_module(spec)
    module = build.task_module(spec, data.prepare(), is_resumed=False)
    trainer = build.trainer(spec, folder, [recorder], [])
    if is_exact:
        trainer.strategy.precision_plugin = DoublePrecision()  # the Trainer refuses it with FSDP2
    trainer.fit(module, datamodule=data)
    return recorder


def _program(files: list[str]) -> None:
    for file in map(Path, files):
        recorder = recorded(run_spec.load(file), file.parent)
        of_rank = {name: vars(recorder)[name] for name in ("parts", "held", "moments_held", "offloads", "roots")}
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, of_rank)
        if torch.distributed.get_rank() == 0:
            kept = {"gradients": recorder.gradients, "computed_in": recorder.computed_in, "ranks": ranks}
            torch.save(kept, file.with_name("gradients.pt"))


if __name__ == "__main__":
    _program(sys.argv[1:])
