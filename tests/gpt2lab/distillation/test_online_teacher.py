"""An online teacher returns the hidden states of its model, in the precision of its weights."""

from pathlib import Path

import pytest
import torch

from gpt2lab.distillation.teacher import OnlineTeacher
from gpt2lab.model.backbone import Backbone, to_hf
from gpt2lab.settings import ModelShape


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_teacher_in_the_dtype_of_autocast_does_without_it(weights: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    to_hf(Backbone(ModelShape(2, 2, 32, n_positions=32, vocab_size=100))).save_pretrained(tmp_path)
    teacher, ids, products = OnlineTeacher(str(tmp_path), weights), torch.randint(100, (2, 16)), []
    linear = teacher.backbone.blocks[0].mlp.c_proj
    linear.register_forward_hook(
        lambda _module, _inputs, output: products.append((output.dtype, torch.is_autocast_enabled("cpu")))
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = teacher.signal(ids)
        whole = teacher.backbone(ids, lambda hidden, _: hidden.flatten(0, 1))
    assert products[0] == (torch.bfloat16, weights != torch.bfloat16)
    torch.testing.assert_close(found.hidden, whole.to(found.hidden.dtype), rtol=0.02, atol=0.02)
