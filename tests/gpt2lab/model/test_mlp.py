"""The MLP of a block is that of transformers, however its GELU is computed, forward and backward."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from gpt2lab.model import mlp as module_of_mlp
from gpt2lab.model.backbone import Backbone
from gpt2lab.model.mlp import FastMLP, Gelu
from gpt2lab.settings import ModelShape
from launch.run.auto_settings import has_compiler

VALUES = [0.0, -0.0, 1e-6, -1e-6, 0.5, -0.75, 1.0, -3.0, 5.0, -5.5, 12.0, -20.0, 300.0, -4e4]
SHAPE = ModelShape(n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=50)
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}  # relative; bf16 has 8 bits


def inputs(dtype: torch.dtype) -> torch.Tensor:
    drawn = 3 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.tensor(VALUES), drawn]).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_gelu_and_its_gradient_are_those_of_fp64(dtype: torch.dtype) -> None:
    inner = inputs(dtype)
    exact = inner.double().requires_grad_()
    expected = functional.gelu(exact, approximate="tanh")
    expected.backward(torch.full_like(exact, 1.5))
    found = module_of_mlp._gelu(inner)
    slope = module_of_mlp._gelu_gradient(torch.full_like(inner, 1.5), inner)
    assert found.dtype == slope.dtype == dtype
    close = {"rtol": TOLERANCES[dtype], "atol": TOLERANCES[dtype]}
    torch.testing.assert_close(found.double(), expected.detach(), **close)
    torch.testing.assert_close(slope.double(), exact.grad, **close)


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
def test_a_compiled_gelu_trains_as_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0))
    gradients, uses, compiled = [], [], module_of_mlp._compiled
    monkeypatch.setattr(module_of_mlp, "_compiled", lambda: uses.append(1) or compiled())
    for compiles in (False, True):
        torch.manual_seed(1)
        backbone = Backbone(SHAPE).train()
        if compiles:
            backbone.compile_gelu()
        backbone.logits(ids).square().sum().backward()
        gradients.append({name: weights.grad for name, weights in backbone.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)
    assert len(uses) == 2 * SHAPE.n_layer, "forward and backward of each block"


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Dtype of every product that computes its GELU too."""
    dtypes: list[torch.dtype] = []
    computed = module_of_mlp.linear_gelu

    def counted(linear: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
        found = computed(linear, hidden)
        dtypes.append(found.dtype)
        return found

    monkeypatch.setattr(module_of_mlp, "linear_gelu", counted)
    monkeypatch.setattr(module_of_mlp, "cpu_has_bf16", lambda: True)
    return dtypes


@pytest.mark.parametrize("kind", ["fp32", "bf16 weights", "autocast"])
def test_the_mlp_without_gradient_is_that_of_transformers(kind: str, fused: list[torch.dtype]) -> None:
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    mlp = Backbone(SHAPE).eval().blocks[0].mlp
    theirs = GPT2MLP(4 * SHAPE.n_embd, GPT2Config(n_embd=SHAPE.n_embd, activation_function="gelu_pytorch_tanh")).eval()
    theirs.load_state_dict(
        {name: value.T if name.endswith("weight") else value for name, value in mlp.state_dict().items()}
    )
    hidden = torch.randn(8, 16, SHAPE.n_embd)
    expected = theirs(hidden)
    if kind == "bf16 weights":
        mlp, hidden = mlp.bfloat16(), hidden.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", enabled=kind == "autocast", dtype=torch.bfloat16):
        found = mlp(hidden)
    assert fused == [dtype]
    assert ((found.float() - expected).norm() / expected.norm()).item() < (1e-6 if kind == "fp32" else 0.01)


@pytest.mark.parametrize("case", ["gradient", "fp64", "fp16", "no operator", "adapter", "no bf16", "few rows"])
def test_other_mlps_compute_the_gelu_by_itself(case: str, fused: list[torch.dtype], monkeypatch) -> None:
    model = Backbone(SHAPE).eval()
    if case == "adapter":
        get_peft_model(model.lm, LoraConfig(target_modules=["c_fc"], init_lora_weights=False))
    elif case == "no operator":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    elif case == "no bf16":
        monkeypatch.setattr(module_of_mlp, "cpu_has_bf16", lambda: False)
    dtypes = {"fp64": torch.float64, "fp16": torch.float16, "no bf16": torch.bfloat16}
    model, rows = model.to(dtypes.get(case, torch.float32)), 2 if case == "few rows" else 100
    hidden = torch.randn(rows, SHAPE.n_embd).to(dtypes.get(case))
    mlp = model.blocks[0].mlp
    with torch.set_grad_enabled(case == "gradient"):
        found = mlp(hidden)
        plain = mlp.c_proj(functional.gelu(mlp.c_fc(hidden), approximate="tanh"))
    assert torch.equal(found, plain)
    assert fused == []


def test_names_of_the_parameters_are_those_of_transformers() -> None:
    theirs = GPT2MLP(4 * SHAPE.n_embd, GPT2Config(n_embd=SHAPE.n_embd))
    assert list(FastMLP(theirs).state_dict()) == list(theirs.state_dict())
    assert not Gelu().state_dict()
