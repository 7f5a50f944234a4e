"""Ratios that speed and memory depend on, each within one run on one machine; never absolute times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import benchmark_lm_head_loss
from benchmarks.benchmark_loop import IMPORTS
from benchmarks.lm_head_sides import EAGER, OURS
from benchmarks.train_command import STEP_TIMES, tiny_run
from tests.conftest import ROOT, environment, needs_two_cores

HEAD = {"precision": "fp32", "width": 64, "rows": 4096, "vocab_size": 64_000}  # logits of four chunks


def run_python(cache: Path, *arguments: str) -> str:
    """Run a Python process and return its standard error."""
    command = [sys.executable, *arguments]
    ended = subprocess.run(command, cwd=ROOT, env=environment(cache), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stderr


def imported_modules(cache: Path, *arguments: str) -> int:
    """Return the number of modules that a Python process imports until its end."""
    listed = run_python(cache, "-X", "importtime", *arguments)
    return sum(line.startswith("import time:") for line in listed.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["cross_entropy", "forward_kl"])
def test_lm_head_loss_takes_a_quarter_of_dense_memory(loss: str) -> None:
    peaks = {
        name: benchmark_lm_head_loss.apart("memory", {"loss": loss, **HEAD}, 1, False, False, name)
        for name in (OURS, EAGER)
    }
    assert peaks[OURS] < 0.25 * peaks[EAGER], peaks


@pytest.mark.slow
def test_a_run_imports_little_beside_its_frameworks(cache: Path, tmp_path: Path) -> None:
    keys = (*tiny_run(), "callbacks=default", "steps=1", f"run_dir={tmp_path / 'run'}")
    assert imported_modules(cache, "train.py", *keys) < 1.6 * imported_modules(cache, "-c", IMPORTS)


@pytest.mark.slow
def test_a_step_is_forward_backward_and_optimizer(cache: Path, tmp_path: Path) -> None:
    """Data, logging, callbacks and Lightning take 1 % of a step of 100 ms on an idle machine."""
    run_dir = tmp_path / "run"
    sizes = ("model.n_embd=128", "model.n_layer=4", "context=128", "batch_tokens=4096", "micro_batch=32")
    run_python(
        cache, "train.py", *tiny_run(), *sizes, "callbacks=default", "steps=60", f"run_dir={run_dir}", STEP_TIMES
    )
    times = json.loads((run_dir / "step_times.json").read_text())
    assert times["outside_share"] < 0.05, times


@pytest.mark.slow
@needs_two_cores
def test_each_rank_of_ddp_orthogonalizes_half_of_the_matrices(cache: Path, tmp_path: Path) -> None:
    """The model has two blocks of four matrices; Muon takes queries, keys and values apart."""
    keys = ["model.n_layer=2", "callbacks=minimal", "optimizer=muon", "steps=3", "accelerator=cpu", "devices=2"]
    keys += ["strategy=ddp", "+callbacks.count._target_=tests.support.count_matrices.CountMatrices"]
    run_python(cache, "train.py", *tiny_run(), *keys, f"run_dir={tmp_path / 'run'}")
    counts = [json.loads((tmp_path / "run" / f"matrices-{rank}.json").read_text()) for rank in range(2)]
    assert counts == [6 * 3, 6 * 3]
