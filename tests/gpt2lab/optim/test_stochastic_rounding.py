"""Weights in bf16: rounded stochastically without bias, stepped as in fp32, equal on replicas and after a resume."""

import copy

import pytest
import torch
from torch import Tensor, nn

from gpt2lab.losses.lm_head_loss import lm_head_loss
from gpt2lab.model.backbone import Backbone
from gpt2lab.model.ema import WeightAverage
from gpt2lab.optim import stochastic_rounding
from gpt2lab.optim.optimizers import build_optimizer
from gpt2lab.optim.stochastic_rounding import round_stochastically
from gpt2lab.settings import ModelShape, OptimizerSettings

STANDARD_ERRORS = 5
MATRIX = "lm.transformer.h.0.mlp.c_fc.weight"  # Muon's
EMBEDDING = "lm.transformer.wte.weight"


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def neighbours(exact: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bf16 neighbours of each value as fp32, the one nearer to zero first; a bf16 value is its own."""
    inner = (exact.view(torch.int32) & ~0xFFFF).view(torch.float32)
    outer = (inner.view(torch.int32) + 0x10000).view(torch.float32)
    return inner, torch.where(inner == exact, exact, outer)


def test_rounding_is_to_a_neighbour_and_unbiased() -> None:
    values = torch.randn(200, generator=seeded(0)) * torch.logspace(-30, 30, 200)
    draws = 20_000
    rounded = round_stochastically(values.expand(draws, -1).contiguous(), seeded(1)).float()
    inner, outer = neighbours(values)
    assert ((rounded == inner) | (rounded == outer)).all()
    gap = (outer - inner).abs()
    share = ((values - inner) / (outer - inner)).double()
    assert share.min() < 0.05
    assert share.max() > 0.95
    error = ((rounded.double().mean(0) - values.double()) / gap.double()).abs()
    assert (error <= STANDARD_ERRORS * (share * (1 - share) / draws).sqrt()).all()
    nearest = (values.bfloat16().double() - values.double()).abs() / gap.double()
    assert nearest.mean() > 0.2, "rounding to the nearest would not pass"


def test_bf16_values_are_rounded_to_themselves() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    every = every[~every.isnan()]
    assert len(every) > 65_000
    assert every.isinf().sum() == 2
    for seed in range(20):
        assert torch.equal(round_stochastically(every.float(), seeded(seed)), every)


def made(name: str, size: tuple[int, int], dtype: torch.dtype, optimizer: OptimizerSettings, seed: int = 0):
    """One parameter of random numbers and its optimizer."""
    parameter = nn.Parameter(torch.randn(size, generator=seeded(0)).to(dtype))
    return parameter, build_optimizer([(name, parameter)], optimizer, fused=True, seed=seed)


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_step_is_the_fp32_step_rounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin is PyTorch's optimizer in fp32, set to our values before each step. Pieces end at any element."""
    monkeypatch.setattr(stochastic_rounding, "CHUNK_NUMEL", 1000)
    settings = OptimizerSettings(name, lr=0.01, weight_decay=0.1, beta2=0.99)
    sizes = {EMBEDDING: (64, 48), "lm.transformer.wpe.weight": (7, 3), "lm.transformer.ln_f.bias": (300,)}
    starts = {key: torch.randn(size, generator=seeded(3)) for key, size in sizes.items()}
    ours = {key: nn.Parameter(start.bfloat16()) for key, start in starts.items()}
    optimizer = build_optimizer(ours.items(), settings, fused=True)
    twins = {key: nn.Parameter(start.bfloat16().float()) for key, start in starts.items()}
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    groups = [{"params": [twin], "weight_decay": 0.1 if twin.ndim == 2 else 0.0} for twin in twins.values()]
    reference = kind(groups, lr=0.01, betas=(settings.beta1, 0.99), eps=settings.eps, fused=True)
    between = 0
    for step in range(6):
        for key, parameter in ours.items():
            parameter.grad = torch.randn(sizes[key], generator=seeded(step)).bfloat16()
            twins[key].grad = parameter.grad.float()
        optimizer.step()
        reference.step()
        for key, parameter in ours.items():
            stored, exact = optimizer.state[parameter], reference.state[twins[key]]
            pairs = [(parameter.detach(), twins[key].detach())]
            pairs += [(stored[moment], exact[moment]) for moment in ("exp_avg", "exp_avg_sq")]
            for mine, theirs in pairs:
                inner, outer = neighbours(theirs)
                assert ((mine.float() == inner) | (mine.float() == outer)).all(), (key, step)
                between += int((mine != theirs.bfloat16()).sum())
                theirs.copy_(mine)
            assert int(stored["step"]) == step + 1
    assert between > 1000, "not all of them the nearest"


@pytest.mark.parametrize(("name", "parameter"), [("adamw", EMBEDDING), ("adam", EMBEDDING), ("muon", MATRIX)])
def test_updates_below_bf16_resolution_accumulate(name: str, parameter: str) -> None:
    """Each update is a fortieth of the smallest that changes a weight of 1 under rounding to nearest."""
    moved = {}
    for dtype in (torch.bfloat16, torch.float32):
        weight = nn.Parameter(torch.ones(96, 96, dtype=dtype))
        settings = OptimizerSettings(name, lr=5e-5, weight_decay=0.1)
        optimizer = build_optimizer([(parameter, weight)], settings, fused=True, seed=7)
        weight.grad = torch.randn(96, 96, generator=seeded(2)).to(dtype)
        for _ in range(40):
            optimizer.step()
        moved[dtype] = weight.detach().double() - 1
    expected, ours = moved[torch.float32].flatten(), moved[torch.bfloat16].flatten()
    assert expected.abs().max() < 0.01
    # The error of the slope is rounding noise with the deviation of `ours` from `expected`.
    slope = (ours @ expected) / (expected @ expected)
    assert abs(slope - 1) <= STANDARD_ERRORS * (ours - expected).std() / expected.norm()
    assert (ours.mean() - expected.mean()).abs() <= STANDARD_ERRORS * (ours - expected).std() / len(ours) ** 0.5
    assert (ours - expected).std() / expected.norm() < 0.1


def test_second_moment_decays_by_a_thousandth_a_step() -> None:
    weight, optimizer = made(EMBEDDING, (100, 100), torch.bfloat16, OptimizerSettings("adam", 1e-4, 0.0, beta2=0.999))
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    square = optimizer.state[weight]["exp_avg_sq"]
    square.fill_(1.0)
    for _ in range(200):
        optimizer.step()
    shrunk = square.double()
    assert abs(shrunk.mean() - 0.999**200) <= STANDARD_ERRORS * shrunk.std() / 100


@pytest.mark.parametrize(("name", "parameter"), [("adamw", EMBEDDING), ("muon", MATRIX)])
def test_rounding_depends_on_the_seed_not_on_global_rng(name: str, parameter: str) -> None:
    ends = []
    for global_seed, seed in ((1, 5), (2, 5), (1, 6)):
        weight, optimizer = made(parameter, (64, 64), torch.bfloat16, OptimizerSettings(name, 1e-3, 0.1), seed)
        torch.manual_seed(global_seed)
        for step in range(3):
            weight.grad = torch.randn(64, 64, generator=seeded(step)).bfloat16()
            optimizer.step()
        ends.append(weight.detach())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_steps_and_pieces_round_with_different_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stochastic_rounding, "CHUNK_NUMEL", 500)
    weight, optimizer = made(EMBEDDING, (40, 100), torch.bfloat16, OptimizerSettings("adamw", 1e-3, 0.0))
    patterns = set()
    for _ in range(4):
        with torch.no_grad():
            weight.fill_(1.0)
        optimizer.state.clear()  # the same exact numbers at every step
        optimizer.state[weight] = {
            "step": torch.tensor(float(len(patterns))),
            "exp_avg": torch.full_like(weight, 1.0),
            "exp_avg_sq": torch.full_like(weight, 1.0),
        }
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        patterns |= {tuple(piece.tolist()) for piece in weight.detach().flatten().split(500)}
    assert len(patterns) == 4 * 8


def test_ema_of_bf16_weights_keeps_fp32_through_validation() -> None:
    weight = nn.Parameter(torch.ones(10, dtype=torch.bfloat16))
    average = WeightAverage([weight], 0.999)
    with torch.no_grad():
        weight.fill_(2.0)
    for step in range(1, 51):
        average.update()
        before = copy.deepcopy(average.averages)
        with average.applied():
            assert torch.equal(weight, average.averages[0].bfloat16())
        assert torch.equal(weight, torch.full((10,), 2.0, dtype=torch.bfloat16))
        assert torch.equal(average.averages[0], before[0])
        assert average.averages[0].double().mean() == pytest.approx(2 - 0.999**step, abs=1e-6)


def test_bf16_weights_sum_loss_and_gradients_in_fp32() -> None:
    """The twin sums in float64 over the same bf16 logits; a bf16 sum of these 256 chunks would stop growing."""
    hidden = torch.randn(4096, 64, generator=seeded(0)).bfloat16().requires_grad_()
    weight = (torch.randn(500, 64, generator=seeded(1)) * 0.3).bfloat16().requires_grad_()
    labels = torch.randint(500, (4096,), generator=seeded(2))
    result = lm_head_loss(hidden, weight, labels, chunk_rows=16)
    result.total.backward()
    logits = (hidden @ weight.T).detach().double()
    assert result.total.dtype == result.cross_entropy.dtype == torch.float32
    total = nn.functional.cross_entropy(logits, labels, reduction="sum").item()
    assert result.total.item() == pytest.approx(total, rel=1e-6)
    errors = logits.softmax(-1) - nn.functional.one_hot(labels, 500)
    for gradient, expected in (
        (weight.grad, errors.T @ hidden.detach().double()),
        (hidden.grad, errors @ weight.detach().double()),
    ):
        assert gradient is not None
        # The inputs of a product and its result are rounded.
        assert (gradient.double() - expected).norm() <= 2**-8 * expected.norm()


def test_bf16_weights_compute_norms_in_fp32() -> None:
    """Inputs are around 3, so that their squares would cancel in bf16; only the rounding of the result remains."""
    norm = Backbone(ModelShape(1, 1, 768, 8, 16)).bfloat16().blocks[0].ln_1
    numbers = (torch.randn(512, 768, generator=seeded(0)) + 3).bfloat16()
    expected = nn.functional.layer_norm(numbers.double(), (768,))
    assert ((norm(numbers).double() - expected).abs() <= 2**-8 * expected.abs() + 1e-4).all()
