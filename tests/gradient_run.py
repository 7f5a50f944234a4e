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

Gradients = list[dict[str, Tensor]]


class Recorder(lightning.Callback):
    """Keeps each step's whole gradient, before it is clipped, and how many sequences and targets its parts had."""

    def __init__(self) -> None:
        self.gradients: Gradients = []
        self.parts: list[tuple[int, int]] = []  # (sequences, targets) of each micro-batch on this rank

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


def run(settings: Config, folder: Path, observers: list[lightning.Callback]) -> lightning.LightningModule:
    """Train as the settings say, with `precision=fp32` taken for float64; validation, checkpoints and reports left out.

    Args:
        folder: an empty one.
    """
    data = build.data_module(settings)
    facts = data.prepare()
    module = build.task_module(settings, facts, resolve.vocabulary(settings, facts))
    trainer = build.trainer(settings, folder, observers, [])
    if settings.precision == "fp32":
        trainer.strategy.precision_plugin = DoublePrecision()  # the Trainer refuses it beside FSDP2
    trainer.fit(module, datamodule=data)
    return module


def gradients_of(settings: Config, folder: Path) -> tuple[Gradients, list[tuple[int, int]]]:
    """Each step's whole gradient by parameter name, and (sequences, targets) of this rank's micro-batches."""
    recorder = Recorder()
    run(settings, folder, [recorder])
    return recorder.gradients, recorder.parts


def _program(specs: list[str]) -> None:
    for spec in map(Path, specs):
        gradients, parts = gradients_of(config.load(spec), spec.parent)
        every_part: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(every_part, parts)
        if torch.distributed.get_rank() == 0:
            torch.save({"gradients": gradients, "parts": every_part}, spec.with_name("gradients.pt"))


if __name__ == "__main__":
    _program(sys.argv[1:])
