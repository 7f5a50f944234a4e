"""Each way to train faster, or in less memory, has the losses of plain fp32 over 50 steps."""

from pathlib import Path

import pytest

from gpt2lab.metric_names import TRAIN_LOSS
from gpt2lab.model import mlp
from gpt2lab.storage.metrics_csv import read_metrics, series
from launch.run.auto_settings import has_compiler
from tests.conftest import Train

STEPS = 50
# Keys → largest difference of a step's training loss from plain fp32, in nats
FAST_PATHS = {
    "precision=bf16": 0.005,
    "precision=bf16_true": 0.01,
    "micro_batch=3": 1e-4,
    "activation_checkpointing=true": 1e-4,
    "compile=auto": 1e-4,  # the work on the logits and GELU
    "compile=true": 1e-4,
    "devices=2": 1e-4,
    "devices=2 strategy=fsdp": 1e-4,
}
QUICK = ("precision=bf16", "micro_batch=3", "compile=auto")


def losses(train_here: Train, tiny: list[str], run_dir: Path, *keys: str) -> list[float]:
    """Return the training loss of each step; of keys that are given twice the last counts."""
    lengths = [f"{key}={STEPS}" for key in ("steps", "validate_every", "checkpoint_every")]
    usual = ["logger=csv", "log_every=1", "compile=false", "optimizer.lr=3e-3"]  # differences grow with the rate
    words = dict(word.split("=", 1) for word in [*tiny, *lengths, *usual, *keys, f"run_dir={run_dir}"])
    ended = train_here(*(f"{key}={value}" for key, value in words.items()))
    assert ended.code == 0, ended.stderr
    return [loss for _, loss in series(read_metrics(run_dir), TRAIN_LOSS)]


@pytest.mark.parametrize(
    "keys", [pytest.param(keys, marks=[pytest.mark.slow] * (keys not in QUICK)) for keys in FAST_PATHS]
)
def test_fast_path_has_the_losses_of_plain_fp32(
    keys: str, train_here: Train, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uses, compiled = [], mlp._compiled
    monkeypatch.setattr(mlp, "_compiled", lambda: uses.append(1) or compiled())
    plain = losses(train_here, tiny, tmp_path / "plain")
    fast = losses(train_here, tiny, tmp_path / "fast", *keys.split())
    assert bool(uses) == (keys == "compile=auto" and has_compiler()), "GELU is compiled by itself"
    assert len(plain) == len(fast) == STEPS
    assert plain[-1] < plain[0] - 1
    worst = max(abs(a - b) for a, b in zip(plain, fast, strict=True))
    assert worst < FAST_PATHS[keys]
