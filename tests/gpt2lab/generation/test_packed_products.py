"""Products by oneDNN are those of the modules themselves, and only plain fp32 modules on a CPU have them."""

from copy import deepcopy
from dataclasses import dataclass, field

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from gpt2lab.generation import packed_products
from gpt2lab.generation.packed_products import FIRST_PACKED, MOST_ROWS, PackedProducts
from gpt2lab.generation.sampling import generate_ids
from gpt2lab.model.backbone import Backbone
from gpt2lab.settings import GREEDY, ModelShape

SIZE = 600  # SIZE² weights are packed


@dataclass
class Rows:
    """Rows of every product, by its weight."""

    plain: list[int] = field(default_factory=list)
    packed: list[int] = field(default_factory=list)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Rows:
    """Products by oneDNN."""
    found, product = Rows(), torch.ops.mkldnn._linear_pointwise

    class Counted:
        _reorder_linear_weight = torch.ops.mkldnn._reorder_linear_weight

        @staticmethod
        def _linear_pointwise(hidden: torch.Tensor, weight: torch.Tensor, *arguments: object) -> torch.Tensor:
            rows = found.packed if weight.is_mkldnn else found.plain
            rows.append(hidden.numel() // hidden.shape[-1])
            return product(hidden, weight, *arguments)

    monkeypatch.setattr(torch.ops, "mkldnn", Counted)
    return found


def module_of(kind: str, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    module = Conv1D(SIZE, SIZE) if kind == "Conv1D" else nn.Linear(SIZE, SIZE, bias=bias)
    for weights in module.parameters():
        nn.init.normal_(weights, std=0.02)
    return module


@torch.inference_mode()
@pytest.mark.parametrize(("kind", "bias"), [("Conv1D", True), ("Linear", True), ("Linear", False)])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2,), (3,), (4, 1), (1, 9), (16, 1), (MOST_ROWS,), (MOST_ROWS + 1,)])
def test_packed_products_equal_those_of_the_module(kind: str, bias: bool, shape: tuple[int, ...], products) -> None:
    module = module_of(kind, bias)
    hidden, product = torch.randn(*shape, SIZE), PackedProducts(module)
    for _ in range(FIRST_PACKED + 1):
        torch.testing.assert_close(product(module, hidden), module(hidden), rtol=1e-5, atol=1e-5)
    rows, is_packed = hidden.numel() // SIZE, 1 < hidden.numel() // SIZE <= MOST_ROWS
    assert products.packed == ([rows] * 2 if is_packed else [])
    before = FIRST_PACKED - 1 if is_packed else FIRST_PACKED + 1
    assert products.plain == ([rows] * before if kind == "Linear" and rows <= MOST_ROWS else [])


@torch.inference_mode()
@pytest.mark.parametrize("case", ["bf16 weights", "autocast", "small", "no operator", "adapter"])
def test_other_products_are_those_of_the_module(case: str, monkeypatch, products) -> None:
    module, hidden = module_of("Linear"), torch.randn(8, SIZE)
    if case == "bf16 weights":
        module, hidden = module.bfloat16(), hidden.bfloat16()
    elif case == "small":
        module, hidden = nn.Linear(32, 32), torch.randn(8, 32)
    elif case == "no operator":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    elif case == "adapter":
        adapted = get_peft_model(nn.Sequential(module), LoraConfig(target_modules=["0"], init_lora_weights=False))
        module = adapted.base_model.model[0]
    with torch.autocast("cpu", enabled=case == "autocast"):
        product = PackedProducts(module)
        for _ in range(FIRST_PACKED):
            assert torch.equal(product(module, hidden), deepcopy(module)(hidden))
    assert products == Rows()


@torch.inference_mode()
@pytest.mark.parametrize("case", ["no room", "not large"])
def test_matrices_that_are_not_packed_are_read_as_they_are(case: str, monkeypatch, products) -> None:
    module = nn.Linear(SIZE, 300 if case == "not large" else SIZE)
    if case == "no room":
        monkeypatch.setattr(packed_products, "host_free_bytes", lambda: SIZE**2 * 4)
    product, hidden = PackedProducts(module), torch.randn(8, SIZE)
    for _ in range(FIRST_PACKED + 1):
        torch.testing.assert_close(product(module, hidden), module(hidden), rtol=1e-5, atol=1e-5)
    assert products == Rows(plain=[8] * (FIRST_PACKED + 1))


def test_a_batch_is_packed_and_the_prompt_of_one_text_is_not(products) -> None:
    torch.manual_seed(0)
    shape = ModelShape(n_layer=2, n_head=4, n_embd=320, n_positions=32, vocab_size=1000, dropout=0.0)
    model, tokens = Backbone(shape).lm, {"max_new_tokens": 8, "end_of_text": 0}
    prompts = [torch.randint(1, 1000, (length,)).tolist() for length in (5, 7, 6, 7, 4)]
    alone = [generate_ids(model, [prompt], GREEDY, **tokens)[0] for prompt in prompts]
    assert products.packed == []
    assert generate_ids(model, prompts, GREEDY, **tokens) == alone
    assert set(products.packed) == {len(prompts)}
