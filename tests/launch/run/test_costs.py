"""Costs of distillation stay small: tokens read by the preflight, memory while the cache is written."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt2lab.model.backbone import Backbone
from lightning_modules.distill import Distill
from lightning_modules.distill_preflight import TOKENS
from tests.conftest import ROOT, Answer, Train, environment

MODULES = 80  # of the standard library, half a million tokens

# In a separate process: write the cache of the run with this config.yaml, and print the cost.
WRITE = """
import json, sys
from pathlib import Path
from torch import device
from gpt2lab.system.device import peak_memory_bytes, reset_peak_memory
from launch.run import build
from launch.run import fill_teacher_cache
from launch.config import run_spec
from dataclasses import replace

spec = run_spec.load(Path(sys.argv[1]))
spec = replace(spec, config=replace(spec.config, cache_dir=sys.argv[2], steps=int(sys.argv[3])))
data = build.data_module(spec)
facts = data.prepare()
before = reset_peak_memory(device("cpu"))
written = Path(fill_teacher_cache.fill(spec, data, facts), "train.bin").stat().st_blocks * 512
print(json.dumps({"grown": peak_memory_bytes(device("cpu")) - before, "written": written}))
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of more Python files than in the quick tests."""
    folder, original = tmp_path_factory.mktemp("text"), Path(json.__file__).parent.parent
    for file in sorted(original.glob("*.py"))[:MODULES]:
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def succeeded(answer: Answer) -> None:
    assert answer.code == 0, answer.stderr


@pytest.mark.slow
def test_preflight_reads_as_few_tokens_as_one_step(
    text: Path, train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Student and teacher read 4,096 tokens each in a step; context and vocabulary are the defaults."""
    read: list[int] = []
    start, forward = Distill.on_train_start, Backbone.forward

    def counting(self: Backbone, ids: Any, *arguments: Any, **options: Any) -> Any:
        read.append(ids.numel())
        return forward(self, ids, *arguments, **options)

    def counted(self: Distill) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(Backbone, "forward", counting)
            start(self)

    monkeypatch.setattr(Distill, "on_train_start", counted)
    keys = ["data=text", f"path={text}", "steps=1", "logger=none", "callbacks=minimal", "devices=1", "accelerator=cpu"]
    succeeded(train_here(*keys, "model=micro", "run_dir=teacher"))
    done = train_here(*keys, "task=distill", "model=nano", "teacher=teacher", "preflight=warn", "run_dir=student")
    succeeded(done)
    assert "preflight: teacher" in done.stderr
    assert 2 * TOKENS < sum(read) < 6 * TOKENS


@pytest.mark.slow
def test_cache_memory_does_not_grow_with_its_size(
    text: Path, train_here: Train, tiny: list[str], cache: Path, tmp_path: Path
) -> None:
    """Memory may grow by at most a tenth of the difference of the two caches on the disk."""
    keys = [*tiny, f"path={text}", "val_fraction=0.05", "optimizer=adamw", "steps=1"]
    succeeded(train_here(*keys, "model.n_embd=64", "run_dir=teacher"))
    cached = ["task=distill", "teacher=teacher", "teacher_cache=topk", "teacher_cache.k=300", "preflight=warn"]
    succeeded(train_here(*keys, *cached, "teacher_cache.dtype=float32", "run_dir=run"))
    small, large = (write(tmp_path / "run" / "config.yaml", tmp_path / f"of_{steps}", steps) for steps in (64, 512))
    assert large["written"] > 7.5 * small["written"]
    assert large["written"] > 200e6
    assert large["grown"] - small["grown"] < (large["written"] - small["written"]) / 10, (small, large)


def write(spec: Path, cache_dir: Path, steps: int) -> dict[str, int]:
    """Return the peak growth of resident memory and the size on the disk, both in bytes."""
    command = [sys.executable, "-c", WRITE, str(spec), str(cache_dir), str(steps)]
    done = subprocess.run(command, cwd=ROOT, env=environment(cache_dir), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
