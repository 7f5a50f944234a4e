"""Optimizers and schedules: Muon against PyTorch's own, the split of parameters, learning-rate curves."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from gpt2lab.model.backbone import Backbone
from gpt2lab.optim.newton_schulz import orthogonalize
from gpt2lab.optim.optimizers import build_optimizer
from gpt2lab.optim.schedules import learning_rate_factor
from gpt2lab.settings import ModelShape, OptimizerSettings, ScheduleSettings

TINY = ModelShape(n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=64)


def test_muon_updates_equal_pytorchs() -> None:
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(64, 48))
    theirs = nn.Parameter(ours.detach().clone())
    settings = OptimizerSettings("muon", lr=0.01, weight_decay=0.1)
    mine = build_optimizer([("lm.transformer.h.0.mlp.c_fc.weight", ours)], settings, fused=False)
    reference = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    start = ours.detach().clone()
    for _ in range(10):
        ours.grad = torch.randn(64, 48)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    assert (ours - theirs).norm() <= 0.02 * (ours - start).norm()  # both orthogonalize in bf16


def test_muon_treats_merged_qkv_as_three_matrices() -> None:
    merged = nn.Parameter(torch.zeros(96, 32))
    optimizer = build_optimizer(
        [("lm.transformer.h.0.attn.c_attn.weight", merged)], OptimizerSettings("muon", 1.0, 0.0), fused=False
    )
    merged.grad = torch.randn(96, 32)
    optimizer.step()
    for part, gradient in zip(merged.detach().chunk(3), merged.grad.chunk(3), strict=True):
        expected = -0.2 * 32**0.5 * orthogonalize(gradient[None] * 1.0)[0].float()
        assert (part - expected).norm() <= 0.05 * expected.norm()


def test_muon_takes_hidden_matrices_and_adamw_everything_else() -> None:
    backbone = Backbone(TINY)
    optimizer = build_optimizer(backbone.named_parameters(), OptimizerSettings("muon", 3e-3, 0.1), fused=False)
    names = {id(p): n for n, p in backbone.named_parameters()}
    muon = {names[id(p)] for group in optimizer.param_groups if "momentum" in group for p in group["params"]}
    assert muon == {n for n, p in backbone.named_parameters() if ".h." in n and p.ndim == 2}
    everything = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(everything) == sorted(names)
    undecayed = [names[id(p)] for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]]
    assert all(name.endswith("bias") or ".ln_" in name for name in undecayed)


@pytest.mark.parametrize("name", ["adamw", "adam", "muon"])
def test_a_closure_sees_every_parameter(name: str) -> None:
    """Lightning zeroes the gradients inside the closure; gradients outside it would accumulate over steps."""
    torch.manual_seed(0)
    backbone = Backbone(TINY)
    optimizer = build_optimizer(backbone.named_parameters(), OptimizerSettings(name, 1e-3, 0.1), fused=False)
    ids = torch.randint(64, (2, 16))

    def closure() -> float:
        optimizer.zero_grad()
        loss = backbone.logits(ids).logsumexp(-1).mean()
        loss.backward()
        return loss.item()

    before = [p.detach().clone() for p in backbone.parameters()]
    for _ in range(3):
        assert optimizer.step(closure) > 0
    stepped = [p.detach().clone() for p in backbone.parameters()]
    with torch.no_grad():
        for parameter, start in zip(backbone.parameters(), before, strict=True):
            parameter.copy_(start)
    apart = build_optimizer(backbone.named_parameters(), OptimizerSettings(name, 1e-3, 0.1), fused=False)
    for _ in range(3):
        apart.zero_grad()
        backbone.logits(ids).logsumexp(-1).mean().backward()
        apart.step()
    assert all(torch.equal(p, s) for p, s in zip(backbone.parameters(), stepped, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "adam", "muon"])
def test_optimizer_restored_from_its_state_continues_equally(name: str, dtype: torch.dtype) -> None:
    def train(model: Backbone, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.logits(ids).flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
            optimizer.step()

    def fresh() -> tuple[Backbone, torch.optim.Optimizer]:
        torch.manual_seed(3)
        model = Backbone(TINY).to(dtype)
        return model, build_optimizer(model.named_parameters(), OptimizerSettings(name, 1e-2, 0.1), fused=True)

    unbroken, optimizer = fresh()
    train(unbroken, optimizer, 0, 6)
    first, first_optimizer = fresh()
    train(first, first_optimizer, 0, 3)
    second, second_optimizer = fresh()
    second.load_state_dict(first.state_dict())
    second_optimizer.load_state_dict(first_optimizer.state_dict())
    train(second, second_optimizer, 3, 6)
    for weight, twin in zip(unbroken.parameters(), second.parameters(), strict=True):
        assert torch.equal(weight, twin)


@pytest.mark.parametrize("name", ["wsd", "cosine", "linear", "constant"])
def test_schedules_warm_up_peak_and_end_as_configured(name: str) -> None:
    schedule = ScheduleSettings(name, warmup_steps=10, final_fraction=0.1, decay_fraction=0.25)
    curve = [learning_rate_factor(step, 100, schedule) for step in range(100)]
    assert curve[0] == pytest.approx(0.1)
    assert curve[9] == pytest.approx(1.0)
    assert curve[-1] == pytest.approx(1.0 if name == "constant" else 0.1)
    assert all(a >= b for a, b in pairwise(curve[9:]))
    if name == "wsd":
        assert curve[74] == 1.0
        assert curve[77] < 1.0


@pytest.mark.parametrize("decay", [1, 2, 5])
@pytest.mark.parametrize("name", ["wsd", "cosine", "linear"])
@pytest.mark.parametrize("cut", [True, False])
def test_every_decay_ends_at_its_final_fraction(name: str, decay: int, cut: bool) -> None:
    steps = 40
    warmup = (
        steps - decay if cut or name != "wsd" else 10
    )  # the decay is what the warm-up leaves, or a share of the run
    schedule = ScheduleSettings(name, warmup, final_fraction=0.1, decay_fraction=0.9 if cut else decay / steps)
    curve = [learning_rate_factor(step, steps, schedule) for step in range(steps)]
    assert curve[-1] == 0.1, "exactly"
    assert curve[warmup - 1 : steps - decay] == [1.0] * (steps - decay - warmup + 1)
    assert curve[steps - decay] == (1.0 if decay > 1 else 0.1)
    assert all(a > b for a, b in pairwise(curve[steps - decay :]))


@pytest.mark.parametrize("name", ["wsd", "cosine", "linear", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 20, 21, 25, 300])
def test_by_default_a_run_of_any_length_peaks_and_decays(name: str, steps: int) -> None:
    schedule = ScheduleSettings(name, warmup_steps=None, final_fraction=0.1)
    curve = [learning_rate_factor(step, steps, schedule) for step in range(steps)]
    assert curve[-1] == (1.0 if name == "constant" else 0.1)
    assert steps == 1 or max(curve) == 1.0
    if steps > 20:
        assert curve == [learning_rate_factor(step, steps, replace(schedule, warmup_steps=20)) for step in range(steps)]


def test_a_run_shorter_than_its_warm_up_still_has_a_schedule() -> None:
    schedule = ScheduleSettings("wsd", warmup_steps=20, final_fraction=0.05)
    assert [learning_rate_factor(step, 3, schedule) for step in range(3)] == pytest.approx([0.05, 0.1, 0.15])
