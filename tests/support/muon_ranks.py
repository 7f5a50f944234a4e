"""One rank of several that updates a tiny model by Muon, under DDP's and FSDP2's layouts, from given gradients.

As a program: python muon_ranks.py RANK WORLD STORE OUT LAYERS. Each rank also makes the updates of a single rank, and
writes what differs to OUT, as JSON: for each layout the largest relative difference of a weight, the numbers of
matrices that were orthogonalized, by shape, and the numbers of one rank.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from gpt2lab.model.backbone import Backbone
from gpt2lab.optim.optimizers import build_optimizer
from gpt2lab.settings import ModelShape, OptimizerSettings
from tests.support.count_matrices import counted_matrices

STEPS = 3


def updated(layout: str, dtype: torch.dtype, shape: ModelShape) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return the whole weights after STEPS steps, and how many matrices of each shape this rank orthogonalized."""
    torch.manual_seed(0)
    model = Backbone(shape).to(dtype)
    if layout == "fsdp":
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    replicas = torch.distributed.group.WORLD if layout == "ddp" else None
    settings = OptimizerSettings("muon", lr=0.01, weight_decay=0.1)
    optimizer = build_optimizer(model.named_parameters(), settings, fused=False, replicas=replicas)
    with counted_matrices() as counted:
        for step in range(STEPS):
            for number, parameter in enumerate(model.parameters()):
                seeded = torch.Generator().manual_seed(1000 * step + number)
                give_gradient(parameter, torch.randn(parameter.shape, generator=seeded).to(dtype))
            optimizer.step()
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    return {name: tensor.detach().float() for name, tensor in whole.items()}, dict(counted)


def give_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    if isinstance(parameter, DTensor):
        gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
    parameter.grad = gradient


def _program(rank: int, world: int, store: str, out: str, layers: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    found: dict[str, Any] = {}
    shape = ModelShape(int(layers), n_head=2, n_embd=32, n_positions=32, vocab_size=64)
    start = dict(Backbone(shape).named_parameters())
    for layout, dtype in (("ddp", torch.float32), ("fsdp", torch.float32), ("ddp", torch.bfloat16)):
        alone, all_matrices = updated("alone", dtype, shape)
        together, matrices = updated(layout, dtype, shape)
        worst = max(float((alone[name] - together[name]).abs().max()) for name in start)
        found[f"{layout} {dtype}"] = {"difference": worst, "own": matrices, "all": all_matrices}
    Path(out).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _program(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
