"""Gradients of a few optimizer steps in float64, through the objects that train.py builds: what tests compare.

As a program, one rank of several: python tests/gradient_run.py SPEC … takes up the run that each SPEC, a config.yaml,
describes, one after the other in one process group. Its gradients lie beside it, in gradients.pt.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lightning
import torch
import torch.distributed
from lightning.pytorch.plugins import DoublePrecision
from torch import Tensor
from torch.distributed.tensor import DTensor

from launch.configuration import config
from launch.configuration.config import Config
from launch.running import build, resolve
from lightning_modules.distill import Distill

Gradients = list[dict[str, Tensor]]


class Recorder(lightning.Callback):
    """Keeps each step's whole gradient, before it is clipped, and how it came about."""

    def __init__(self) -> None:
        self.gradients: Gradients = []
        self.parts: list[tuple[int, int]] = []  # (sequences, targets) of each micro-batch on this rank
        self.computed_in: torch.dtype | None = None  # the type of a block's weights while it works
        self.split_tensors_of_teacher = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        attention = pl_module.backbone.blocks[0].attn

        def look(module: torch.nn.Module, given: Any) -> None:
            self.computed_in = next(module.parameters()).dtype

        attention.register_forward_pre_hook(look)
        if isinstance(pl_module, Distill) and not pl_module.cache:
            teacher = pl_module.teacher.backbone.parameters()
            self.split_tensors_of_teacher = sum(isinstance(parameter, DTensor) for parameter in teacher)

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


def recorded(settings: Config, folder: Path) -> Recorder:
    """Train as the settings say, with `precision=fp32` taken for float64; validation, checkpoints and reports left out.

    Args:
        folder: an empty one.
    """
    recorder = Recorder()
    data = build.data_module(settings)
    facts = data.prepare()
    module = build.task_module(settings, facts, resolve.vocabulary(settings, facts))
    trainer = build.trainer(settings, folder, [recorder], [])
    if settings.precision == "fp32":
        trainer.strategy.precision_plugin = DoublePrecision()  # the Trainer refuses it beside FSDP2
    trainer.fit(module, datamodule=data)
    return recorder


def _program(specs: list[str]) -> None:
    for spec in map(Path, specs):
        recorder = recorded(config.load(spec), spec.parent)
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, recorder.parts)
        if torch.distributed.get_rank() == 0:
            kept = {name: vars(recorder)[name] for name in ("gradients", "computed_in", "split_tensors_of_teacher")}
            torch.save({**kept, "parts": parts}, spec.with_name("gradients.pt"))


if __name__ == "__main__":
    _program(sys.argv[1:])
