"""Errors and help end before PyTorch and other heavy packages are imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment

# Packages that take from tens of milliseconds to seconds to import. `import hydra` alone imports none of them.
HEAVY = {"torch", "lightning", "transformers", "tokenizers", "safetensors", "datasets", "pyarrow", "pandas", "peft"}
HEAVY |= {"torchmetrics", "nltk", "rouge_score", "sacrebleu", "wandb", "tensorboard", "rich", "aiohttp", "ray"}
HEAVY |= {"submitit", "numpy", "scipy", "sympy", "triton", "optuna", "sqlalchemy", "huggingface_hub"}

COMMANDS = [
    ("train.py --help", 0, "--cfg job"),
    ("train.py -h", 0, "--cfg job"),
    ("train.py --help optimizer", 0, "optimizer.lr=auto"),
    ("train.py --help stpes", 2, "did you mean steps?"),
    ("train.py --cfg job", 0, "batch_tokens:"),
    ("train.py modle=small", 2, "no key modle"),
    ("train.py model=smal", 2, "did you mean small?"),
    ("train.py context=4096", 2, "longer than model nano's 1024 positions"),
    ("train.py name=x run_dir=y", 2, "one of them"),
    ("evaluate.py --help", 0, "checkpoint="),
    ("evaluate.py", 2, "checkpoint= is missing"),
    ("evaluate.py chekpoint=x", 2, "did you mean checkpoint?"),
    ("evaluate.py checkpoint=/nowhere", 2, "no such folder"),
    ("evaluate.py checkpoint=. context=x", 2, "context=x"),
    ("generate.py --help", 0, "checkpoint="),
    ("generate.py", 2, "checkpoint= is missing"),
    ("generate.py temprature=1", 2, "did you mean sampling.temperature?"),
    ("generate.py checkpoint=/nowhere prompt=x", 2, "no such folder"),
    ("generate.py checkpoint=. prompt=x sampling.top_k=-1", 2, "sampling.top_k=-1"),
    ("generate.py temperature=1", 2, "did you mean sampling.temperature?"),
    ("generate.py checkpoint=. sampling=beam sampling.temperature=1", 2, "does not read sampling.temperature"),
    ("train.py sampling=beam sampling.temperature=1", 2, "does not read sampling.temperature"),
    ("evaluate.py checkpoint=. sampling.top_p=0.9", 2, "Give sampling=top_k, or leave it out"),
]


@pytest.mark.parametrize(("command", "code", "words"), COMMANDS, ids=[command for command, _, _ in COMMANDS])
def test_command_ends_before_heavy_imports(command: str, code: int, words: str, cache: Path, tmp_path: Path):
    """Python lists every import of the process up to its end, also those after the output."""
    program, *arguments = command.split()
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / program), *arguments],
        cwd=tmp_path,
        env=environment(cache),
        capture_output=True,
        text=True,
    )
    listed, printed = [], [ended.stdout]
    for line in ended.stderr.splitlines():
        (listed if line.startswith("import time:") else printed).append(line)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in listed}
    assert ended.returncode == code, ended.stderr
    assert words in "\n".join(printed)
    assert "launch" in imported, "the list of imports is empty"
    assert not imported & HEAVY
