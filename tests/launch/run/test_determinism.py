"""trainer.deterministic=true: set in every process before CUDA starts; runs repeat bitwise, also after SIGKILL."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gpt2lab.generation.sampling import generate_ids
from gpt2lab.model.backbone import Backbone
from gpt2lab.settings import NUCLEUS, ModelShape
from gpt2lab.storage.metrics_csv import read_metrics
from gpt2lab.system import determinism
from launch.run import build
from tests.conftest import ROOT, Distil, Train, environment
from tests.launch.run.test_resume import assert_same_end, finish, kill_after_step
from tests.support.configurations import composed, prepared, resolved

SEEN = """
import json, os
from pathlib import Path
import lightning
import torch

class Seen(lightning.Callback):
    def __init__(self, folder):
        self.file = Path(folder, f"{os.getpid()}.json")
        self.workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")

    def on_train_start(self, trainer, pl_module):
        self.file.write_text(json.dumps([self.workspace, torch.are_deterministic_algorithms_enabled()]))
"""
DETERMINISTIC = "trainer.deterministic=true"


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of a callback that records the environment when it is built, before the Trainer, and the algorithms."""
    (tmp_path / "watched").mkdir()
    (tmp_path / "seen.py").write_text(SEEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(determinism.CUBLAS_VARIABLE, "")
    monkeypatch.delenv(determinism.CUBLAS_VARIABLE)
    return ["+callbacks.seen._target_=seen.Seen", f"+callbacks.seen.folder={tmp_path / 'watched'}"]


@pytest.fixture
def reset_algorithms() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def recorded(folder: Path) -> list[list[object]]:
    return [json.loads(file.read_text()) for file in (folder / "watched").iterdir()]


def test_deterministic_fixes_cublas_before_the_trainer_exists(
    train_here: Train, tiny: list[str], seen: list[str], tmp_path: Path, reset_algorithms: None
) -> None:
    assert train_here(*tiny, *seen, DETERMINISTIC, "steps=1", "run_dir=run").code == 0
    assert recorded(tmp_path) == [[":4096:8", True]]
    torch.use_deterministic_algorithms(False)
    del os.environ[determinism.CUBLAS_VARIABLE]
    assert train_here("resume=run", "steps=2", "allow_targets=[seen]").code == 0
    assert recorded(tmp_path) == [[":4096:8", True]], "a resumed run keeps it"


def test_other_cublas_workspace_is_refused(train_here: Train, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(determinism.CUBLAS_VARIABLE, ":0:0")
    answer = train_here(*tiny, DETERMINISTIC, "steps=1")
    assert answer.code == 2
    assert "CUBLAS_WORKSPACE_CONFIG=:0:0" in answer.stderr
    assert ":4096:8 or :16:8" in answer.stderr


def test_deterministic_ddp_keeps_its_buckets() -> None:
    """DDP rearranges them after the first step of each start, unless it searches for unused weights."""
    spec = prepared(resolved(composed("strategy=ddp", "devices=2", "accelerator=cpu", DETERMINISTIC)))
    assert build.strategy(spec)._ddp_kwargs["find_unused_parameters"]


def test_tokens_may_be_chosen_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU under deterministic algorithms, where nucleus sampling has no cumulative sum."""
    torch.manual_seed(0)
    lm = Backbone(ModelShape(1, 2, 16, 32, 40)).lm
    texts = []
    for has_cumsum in (True, False):
        monkeypatch.setattr(
            "gpt2lab.generation.token_choice.has_deterministic_cumsum", lambda device, has=has_cumsum: has
        )
        given = {"max_new_tokens": 8, "end_of_text": 0, "row_seeds": [1, 2]}
        texts.append(generate_ids(lm, [[5, 6], [7]], NUCLEUS, **given))
    assert texts[0] == texts[1]


DISTILLED: tuple[tuple[str, ...], ...] = (
    ("loss=jsd",),
    ("loss=taid", "packing=true"),
    ("teacher_cache=topk", "teacher_cache.k=8"),
    ("teacher_cache=sampled", "teacher_cache.n=8"),
    ("sequences=gkd", "sequences.lmbda=1", "sequences.max_new_tokens=8"),
)
PRETRAINED = tuple((f"objective={name}", "packing=true") for name in ("clm", "prefix_lm", "mlm", "fim"))
PRETRAINED += (("objective=sampled_softmax", "objective.negatives=50"), ("layer_drop=0.5",), ("precision=bf16_true",))
SAMPLED = ("callbacks=default", "callbacks.checkpoint.verify_export=false", "callbacks.samples.max_new_tokens=6")


@pytest.mark.slow
@pytest.mark.parametrize("keys", [*DISTILLED, *PRETRAINED], ids=" ".join)
def test_every_task_trains_with_deterministic_algorithms(
    keys: tuple[str, ...],
    distil: Distil,
    train_here: Train,
    tiny: list[str],
    reset_algorithms: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PyTorch then fills new memory with NaN, so a loss that reads any of it would not be finite."""
    monkeypatch.setenv(determinism.CUBLAS_VARIABLE, ":4096:8")
    given = (*keys, *SAMPLED, DETERMINISTIC, "compile=false", "run_dir=run")
    if keys in DISTILLED:
        distil(*given, "preflight=off", without=("callbacks",))
    else:
        own = [key for key in tiny if not key.startswith(("callbacks", keys[0].split("=")[0]))]
        answer = train_here(*own, *given, "steps=4")
        assert answer.code == 0, answer.stderr
    losses = [float(row[name]) for row in read_metrics("run") for name in ("train/loss", "val/loss") if row.get(name)]
    assert losses
    assert all(map(math.isfinite, losses))


PROCESSES = {
    "one": ("devices=1",),
    "ranks": ("devices=2", "strategy=ddp"),
    "sharded ranks": ("devices=2", "strategy=fsdp"),
    "sweep": ("-m", "seed=1,2", "devices=1"),
    "torchrun": ("strategy=ddp",),
}


@pytest.mark.slow
@pytest.mark.parametrize("started", PROCESSES)
def test_deterministic_reaches_every_process(
    started: str, cache: Path, tiny: list[str], seen: list[str], tmp_path: Path
) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2") if started == "torchrun" else ()
    keys = [*tiny, *seen, DETERMINISTIC, "steps=2", *PROCESSES[started]]
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *keys]
    ended = subprocess.run(command, cwd=tmp_path, env=environment(cache), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert recorded(tmp_path) == [[":4096:8", True]] * (1 if started == "one" else 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", [("devices=1",), ("devices=2", "strategy=ddp"), ("devices=2", "strategy=fsdp")], ids=" ".join
)
def test_deterministic_runs_repeat_bitwise_after_sigkill(
    strategy: tuple[str, ...], cache: Path, tiny: list[str], tmp_path: Path
) -> None:
    runs = [tmp_path / name for name in ("first", "second", "killed")]
    keys = [*tiny, DETERMINISTIC, *strategy, f"cache_dir={cache}", "model.dropout=0.1", "micro_batch=2", "threads=1"]
    keys += ["steps=40", "validate_every=10", "checkpoint_every=4", "log_every=2", "compile=false"]
    for run in runs[:2]:
        finish("train.py", *keys, f"run_dir={run}")
    kill_after_step(6, runs[2], "train.py", *keys, f"run_dir={runs[2]}")
    finish("train.py", f"resume={runs[2]}")
    for run in runs[1:]:
        assert_same_end(run, runs[0])
