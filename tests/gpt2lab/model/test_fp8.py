"""precision=fp8 as torchao emulates it on a CPU: the blocks' products alone are coarser, and training goes on."""

import copy

import pytest
import torch
from torch import Tensor, nn

from gpt2lab.model.backbone import Backbone
from gpt2lab.model.fp8 import to_fp8
from gpt2lab.settings import ModelShape

pytest.importorskip("torchao", reason='precision=fp8 needs torchao: pip install "torchao>=0.18"')

TINY = ModelShape(n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=64)
PRODUCTS = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}


def loss_of(model: Backbone, ids: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model.logits(ids)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


@pytest.fixture
def pair() -> tuple[Backbone, Backbone]:
    """The same weights in bf16 and in fp8."""
    torch.manual_seed(0)
    plain = Backbone(TINY)
    with torch.no_grad():
        for block in plain.blocks:  # as large as trained ones, so that the blocks matter
            for parameter in block.parameters():
                parameter.mul_(5 if parameter.ndim == 2 else 1)
    coarse = copy.deepcopy(plain)
    to_fp8(coarse.blocks, emulated=True)
    return plain, coarse


def test_only_the_blocks_products_change_and_no_name_does(pair: tuple[Backbone, Backbone]) -> None:
    plain, coarse = pair
    assert plain.state_dict().keys() == coarse.state_dict().keys()
    assert all(torch.equal(tensor, coarse.state_dict()[name]) for name, tensor in plain.state_dict().items())
    assert coarse.lm.lm_head.weight is coarse.lm.transformer.wte.weight
    changed = {n for n, module in coarse.named_modules() if type(module) is not type(plain.get_submodule(n))}
    assert changed == {f"lm.transformer.h.{layer}.{name}" for layer in range(2) for name in PRODUCTS}


@pytest.mark.parametrize("positions", [32, 13])
def test_gradients_are_those_of_bf16_to_the_digits_of_fp8(pair: tuple[Backbone, Backbone], positions: int) -> None:
    """e4m3 keeps 4 bits, e5m2 for gradients 3: an error of up to a sixteenth and an eighth of each number."""
    ids = torch.randint(64, (3, positions), generator=torch.Generator().manual_seed(1))
    gradients = []
    for model in pair:
        loss_of(model, ids).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, exact in gradients[0].items():
        error = (gradients[1][name] - exact).norm() / exact.norm()
        assert 1e-3 < error < 0.25, name


def test_training_in_fp8_learns_as_in_bf16(pair: tuple[Backbone, Backbone]) -> None:
    ends = []
    for model in pair:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(60):
            start = torch.randint(64, (8, 1), generator=torch.Generator().manual_seed(step))
            loss = loss_of(model, (start + torch.arange(16)) % 64)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ends.append(loss.item())
    assert ends[0] < 1.0
    assert ends[1] == pytest.approx(ends[0], abs=0.1)
