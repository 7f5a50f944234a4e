"""Use as a library without Lightning and Hydra: load a run, score it, distil from it, generate text."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import ROOT, Train

PROGRAM = """
import sys, torch
from gpt2lab.distillation.teacher import OnlineTeacher
from gpt2lab.generation.text_model import load_model
from gpt2lab.losses.lm_head_loss import lm_head_loss
from gpt2lab.settings import LossSettings

model = load_model("run")
ids = model.encode("def heappush(heap, item):")
hidden, weight = model.hidden_states(ids[:, :-1])
teacher = OnlineTeacher("run").signal(ids[:, :-1])
loss = lm_head_loss(hidden, weight, ids[0, 1:], teacher=teacher, loss=LossSettings("forward_kl", hard_weight=0.5))
loss.total.backward()
print(loss.cross_entropy.item(), loss.divergence.item())
print(repr(model.generate(["def "], max_new_tokens=8)[0]))
print(sorted({name.partition(".")[0] for name in sys.modules} & {"lightning", "pytorch_lightning", "hydra", "wandb"}))
"""


@pytest.fixture
def run(train_here: Train, tiny: list[str], tmp_path: Path) -> Path:
    assert train_here(*tiny, "steps=2", "run_dir=run").code == 0
    return tmp_path / "run"


def test_a_run_is_usable_without_lightning_and_hydra(run: Path):
    given = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=run.parent, env=given, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    numbers, text, frameworks = ended.stdout.splitlines()
    cross_entropy, divergence = map(float, numbers.split())
    tokenizer, plain = AutoTokenizer.from_pretrained(run / "hf"), AutoModelForCausalLM.from_pretrained(run / "hf")
    ids = tokenizer("def heappush(heap, item):", return_tensors="pt")["input_ids"]
    targets = ids.shape[1] - 1
    assert cross_entropy == pytest.approx(plain(ids, labels=ids).loss.item() * targets, rel=1e-5)
    assert divergence == pytest.approx(0, abs=1e-4)  # the teacher is the student
    prompt = tokenizer("def ", return_tensors="pt")
    written = plain.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert text == repr(tokenizer.decode(written))
    assert frameworks == "[]"
