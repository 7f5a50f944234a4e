"""Attention of short sequences in bf16 on a CPU is that of PyTorch, forward and backward, with every mask."""

import pytest
import torch
import torch.nn.functional as F

from gpt2lab.model import short_attention as module_of_attention
from gpt2lab.model.backbone import Backbone
from gpt2lab.model.short_attention import BLOCK, MOST_POSITIONS, MOST_WITHOUT_GRADIENT, short_attention
from gpt2lab.settings import ModelShape
from gpt2lab.system.device import cpu_has_bf16

B, H, D = 2, 3, 8
CLOSE = 0.01  # norm of the difference ÷ norm; bf16 has 8 bits


@pytest.fixture(autouse=True)
def has_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take this CPU as one with bf16 in hardware."""
    monkeypatch.setattr(module_of_attention, "HAS_BF16", True)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def masks(length: int) -> dict[str, torch.Tensor | None]:
    causal = torch.ones(length, length, dtype=torch.bool).tril().expand(B, 1, length, length)
    second = torch.arange(length) >= length // 2
    packed = causal & (second[:, None] == second[None, :])
    return {"causal": None, "packed": packed, "bidirectional": torch.ones_like(causal)}


@pytest.mark.parametrize("length", [3, 4, 33, BLOCK, BLOCK + 1, 3 * BLOCK - 1, MOST_POSITIONS])
@pytest.mark.parametrize("name", masks(2))
def test_attention_and_gradients_are_those_of_fp32(length: int, name: str) -> None:
    mask = masks(length)[name]
    generator = torch.Generator().manual_seed(length)
    inputs = [torch.randn(B, H, length, D, generator=generator).bfloat16().requires_grad_() for _ in range(3)]
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    output, _ = short_attention(torch.nn.Identity(), *inputs, mask)
    expected = F.scaled_dot_product_attention(*exact, attn_mask=mask, is_causal=mask is None).transpose(1, 2)
    assert relative(output.float(), expected) < CLOSE
    gradient = torch.randn(expected.shape, generator=generator)
    output.backward(gradient.bfloat16())
    expected.backward(gradient)
    for tensor, right in zip(inputs, exact, strict=True):
        assert tensor.grad is not None
        assert right.grad is not None
        assert relative(tensor.grad.float(), right.grad) < CLOSE


@pytest.mark.parametrize("kind", ["fp32", "one position", "long", "longer", "cache", "dropout", "emulated"])
def test_all_other_attention_is_sdpas(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_of_attention, "HAS_BF16", kind != "emulated")
    length = {"one position": 1, "long": MOST_POSITIONS + 1, "longer": MOST_WITHOUT_GRADIENT + 1}.get(kind, 5)
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    key, value = torch.randn(2, B, H, length, D, dtype=dtype)
    query = torch.randn(B, H, 2, D, dtype=dtype) if kind == "cache" else torch.randn(B, H, length, D, dtype=dtype)
    dropout = 0.5 if kind == "dropout" else 0.0
    module = torch.nn.Identity()
    module.is_causal = True
    torch.manual_seed(1)
    with torch.set_grad_enabled(kind != "longer"):
        found, _ = short_attention(module, query, key, value, None, dropout)
    torch.manual_seed(1)
    expected = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=length > 1)
    assert torch.equal(found, expected.transpose(1, 2))


@torch.no_grad()
def test_longer_attention_without_gradient_is_that_of_fp32() -> None:
    inputs = torch.randn(3, B, H, MOST_WITHOUT_GRADIENT, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    found, _ = short_attention(torch.nn.Identity(), *inputs, None)
    expected = F.scaled_dot_product_attention(*inputs.float(), is_causal=True).transpose(1, 2)
    assert relative(found.float(), expected) < CLOSE


def test_position_that_attends_to_nothing_is_finite() -> None:
    query, key, value = torch.randn(3, B, H, 4, D, dtype=torch.bfloat16)
    mask = torch.ones(4, 4, dtype=torch.bool).tril().expand(B, 1, 4, 4).clone()
    mask[:, :, 0] = False
    assert torch.isfinite(short_attention(torch.nn.Identity(), query, key, value, mask)[0]).all()


@pytest.mark.parametrize("kind", ["recomputed", pytest.param("compiled", marks=pytest.mark.slow)])
def test_short_attention_of_blocks_has_the_same_gradient(kind: str) -> None:
    if kind == "compiled" and not cpu_has_bf16():
        pytest.skip("compiled code of emulated bf16 is not used")
    ids = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0))
    gradients = []
    for change in (None, kind):
        torch.manual_seed(1)
        backbone = Backbone(ModelShape(2, 2, 32, 16, 50)).train()
        if change == "recomputed":
            backbone.checkpoint_activations()
        elif change == "compiled":
            backbone.compile_blocks()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            backbone.logits(ids).float().square().sum().backward()
        weight = backbone.get_parameter("lm.transformer.h.0.attn.c_attn.weight")
        assert weight.grad is not None
        gradients.append(weight.grad)
    assert relative(gradients[1], gradients[0]) < CLOSE
