"""Each way to train faster, or in less memory, has the losses of plain fp32 over 50 steps."""

from pathlib import Path

import pytest
import torch
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

from gpt2lab.losses import lm_head_loss
from gpt2lab.metric_names import TRAIN_LOSS
from gpt2lab.model import mlp
from gpt2lab.model.backbone import Backbone
from gpt2lab.storage.metrics_csv import read_metrics, series
from launch.run.auto_settings import has_compiler
from tests.conftest import Distil, Train, needs_two_cores

STEPS = 50
# Keys → largest difference of a step's training loss from plain fp32, in nats
FAST_PATHS = {
    "precision=bf16": 0.005,
    "precision=bf16_true": 0.01,
    "micro_batch=3": 1e-4,
    "activation_checkpointing=true": 1e-4,
    "compile=auto": 1e-4,  # the work on the logits and GELU
    "compile=true": 1e-4,
    "precision=bf16 compile=auto": 0.005,  # the default of a CPU
    "precision=bf16 compile=true": 0.005,  # that of a GPU
    "devices=2": 1e-4,
    "devices=2 strategy=fsdp": 1e-4,
}
QUICK = ("precision=bf16", "micro_batch=3", "compile=auto")
# Compiled where there is a compiler
COMPILED = {"compile=auto": "compile_gelu", "compile=true": "compile_pass"}
USUAL = ("logger=csv", "log_every=1", "compile=false", "optimizer.lr=3e-3")  # differences grow with the rate
LENGTHS = tuple(f"{key}={STEPS}" for key in ("steps", "validate_every", "checkpoint_every"))


def losses(train_here: Train, tiny: list[str], run_dir: Path, *keys: str) -> list[float]:
    """Return the training loss of each step; of keys that are given twice the last counts."""
    words = dict(word.split("=", 1) for word in [*tiny, *LENGTHS, *USUAL, *keys, f"run_dir={run_dir}"])
    ended = train_here(*(f"{key}={value}" for key, value in words.items()))
    assert ended.code == 0, ended.stderr
    return losses_of(run_dir)


def losses_of(run_dir: Path) -> list[float]:
    found = [loss for _, loss in series(read_metrics(run_dir), TRAIN_LOSS)]
    assert len(found) == STEPS
    return found


def difference(plain: list[float], fast: list[float]) -> float:
    """Return the largest difference of a step."""
    assert plain[-1] < plain[0] - 0.5
    return max(abs(a - b) for a, b in zip(plain, fast, strict=True))


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(keys, marks=[pytest.mark.slow] * (keys not in QUICK) + [needs_two_cores] * ("devices" in keys))
        for keys in FAST_PATHS
    ],
)
def test_fast_path_has_the_losses_of_plain_fp32(
    keys: str, train_here: Train, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = losses(train_here, tiny, tmp_path / "plain")
    uses, compiled = [], mlp._compiled
    monkeypatch.setattr(mlp, "_compiled", lambda: uses.append("compile_gelu") or compiled())
    honest = Backbone.compile_pass
    monkeypatch.setattr(Backbone, "compile_pass", lambda self: uses.append("compile_pass") or honest(self))
    torch._dynamo.reset()
    fast = losses(train_here, tiny, tmp_path / "fast", *keys.split())
    expected = {COMPILED[key] for key in keys.split() if key in COMPILED and has_compiler()}
    assert set(uses) == expected
    if "compile_pass" in expected:
        assert _debug_get_cache_entry_list(Backbone._hidden_states.__code__), "the pass was not compiled"
    assert difference(plain, fast) < FAST_PATHS[keys]


def test_chunks_have_the_losses_of_all_logits_at_once(
    train_here: Train, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step has 256 positions."""
    plain = losses(train_here, tiny, tmp_path / "plain")
    chunks, honest = [], lm_head_loss.rows_of_a_chunk
    monkeypatch.setattr(lm_head_loss, "BYTES_OF_A_CHUNK", 50 * 300 * 4)
    monkeypatch.setattr(lm_head_loss, "rows_of_a_chunk", lambda *sizes: chunks.append(honest(*sizes)) or chunks[-1])
    fast = losses(train_here, tiny, tmp_path / "fast")
    assert max(chunks) <= 50
    assert difference(plain, fast) < 1e-4


@pytest.mark.slow
def test_a_whole_cached_teacher_has_the_losses_of_an_online_one(distil: Distil, tmp_path: Path) -> None:
    """All 300 probabilities of a token are kept."""
    usual = (*LENGTHS, *USUAL[:3], "optimizer=adamw", "optimizer.lr=1e-3")  # Muon magnifies the rounding of the cache
    cached = ("teacher_cache=topk", "teacher_cache.k=300", "teacher_cache.dtype=float32")
    for name, keys in {"online": (), "cached": cached}.items():
        distil(*usual, *keys, f"run_dir={name}", without=("logger",))
    assert difference(*(losses_of(tmp_path / name) for name in ("online", "cached"))) < 1e-4
