"""Optimizers: AdamW, Adam, and Muon for the hidden matrices with AdamW for everything else, as one Optimizer object."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from gpt2lab.optim.newton_schulz import orthogonalize_over_ranks
from gpt2lab.optim.stochastic_rounding import RoundingAdam, is_bf16, round_stochastically, to_local
from gpt2lab.settings import OPTIMIZERS, OptimizerSettings


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    settings: OptimizerSettings,
    *,
    fused: bool,
    seed: int = 0,
    replicas: ProcessGroup | None = None,
) -> torch.optim.Optimizer:
    """Build the optimizer; weight decay applies to matrices and embeddings, never to biases or layer norms.

    Args:
        named_parameters: names as in `Backbone`; parameters without `requires_grad` are skipped.
        fused: one kernel per AdamW step; incompatible with fp16 gradient scaling combined with clipping.
        seed: for the stochastic rounding of bf16 weights.
        replicas: process group of ranks with the same weights and gradients (DDP), between which Muon divides its work.
    """
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    hidden = [p for name, p in trained if settings.name == "muon" and is_hidden_matrix(name, p)]
    hidden_ids = {id(parameter) for parameter in hidden}
    rest = [parameter for _, parameter in trained if id(parameter) not in hidden_ids]
    betas = (settings.beta1, settings.beta2)
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.name in OPTIMIZERS.added:
        return OPTIMIZERS.added[settings.name](groups, settings)
    if settings.name == "muon":
        for group in groups:
            group["lr"] = settings.adamw_lr or settings.lr
        if hidden:
            groups.append({"params": hidden, "weight_decay": settings.weight_decay, "momentum": settings.momentum})
    kind = MuonWithAdamW if settings.name == "muon" else RoundingAdam
    # With bf16 weights RoundingAdam calls the fused kernel itself; fused=True would move `step` to the device.
    fused = fused and not any(is_bf16(parameter) for _, parameter in trained)
    is_decoupled = settings.name != "adam"
    optimizer = kind(groups, settings.lr, betas, settings.eps, fused=fused, decoupled_weight_decay=is_decoupled)
    optimizer.seed = seed
    if isinstance(optimizer, MuonWithAdamW):
        optimizer.replicas = replicas
    return optimizer


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon trains it: a weight matrix inside a block; not embeddings, head, norms, biases or LoRA factors."""
    return ".h." in name and parameter.ndim == 2 and "lora_" not in name


class MuonWithAdamW(RoundingAdam):
    """AdamW, except that parameter groups with a `momentum` are updated by Muon.

    Muon: Nesterov momentum, orthogonalized by Newton–Schulz in bf16, scaled by 0.2 · sqrt(max(rows, columns)) so that
    an update has AdamW's typical RMS (`match_rms_adamw`) and both use the same learning rate. The merged QKV matrix
    (3D, D) is orthogonalized as three matrices. Each rank orthogonalizes its share of them (newton_schulz.py).

    Source: Jordan et al. 2024; scale of Moonlight (arXiv 2502.16982), as in `torch.optim.Muon`.

    Attributes:
        replicas: process group of ranks with the same weights and gradients; None: there are none, or the parameters
            are sharded (FSDP2).
    """

    replicas: ProcessGroup | None = None

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all groups once; `closure` as in any PyTorch optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()  # before param_groups is changed: it zeroes the gradients of all groups
        every_group = self.param_groups
        self.param_groups = [group for group in every_group if "momentum" not in group]
        try:
            super().step()
        finally:
            self.param_groups = every_group
        for group in every_group:
            if "momentum" in group:
                self._muon_step(group)
        return loss

    @torch.no_grad()
    def _muon_step(self, group: dict) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["step"] = torch.zeros(())  # AdamW's load_state_dict expects it in every state
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters]
        averages = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        # Nesterov; one by one, since PyTorch before 2.13 has no such operation for lists of DTensors
        updates = [one.lerp(average, group["momentum"]) for one, average in zip(gradients, averages, strict=True)]
        orthogonalize_over_ranks(updates, self.replicas)
        decay, held = 1 - group["lr"] * group["weight_decay"], [to_local(update) for update in updates]
        if not any(map(is_bf16, parameters)):
            weights = [to_local(parameter) for parameter in parameters]
            torch._foreach_mul_(weights, decay)
            torch._foreach_add_(weights, held, alpha=-group["lr"])
            return
        for index, (parameter, update) in enumerate(zip(parameters, held, strict=True)):  # a copy in fp32 at a time
            weight = to_local(parameter).float() if is_bf16(parameter) else to_local(parameter)
            weight.mul_(decay).add_(update, alpha=-group["lr"])
            if is_bf16(parameter):
                step = self.state[parameter]["step"].add_(1)
                generator = self.make_generator(parameter, int(step), -1, index)
                to_local(parameter).copy_(round_stochastically(weight, generator))
