"""Checkpoints that ranks write in parts: whole or not there, taken up by any number of ranks, made one by a command."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Train, environment
from safetensors.torch import load_file

from gpt2lab.checkpoint_ledger import newest_good_checkpoint, step_of
from gpt2lab.errors import InputError
from gpt2lab.metrics_file import read_metrics
from gpt2lab.run_report import read_report
from gpt2lab.sharded_checkpoint import is_sharded, read_whole
from launch.consolidate import consolidate

KEYS = ("steps=4", "checkpoint_every=2", "validate_every=4", "log_every=1", "ema=0.5", "schedule.warmup_steps=2")
KEYS += ("devices=2", "strategy=fsdp", "checkpoint_format=sharded", "run_dir=run")


def losses(folder: Path) -> dict[str, float]:
    return {row["step"]: float(row["train/loss"]) for row in read_metrics(folder) if row.get("train/loss")}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "hf" / "model.safetensors")


def test_one_rank_takes_up_what_two_wrote_and_one_command_makes_it_whole(
    train_process: Train, train_here: Train, tiny: list[str], tmp_path: Path
) -> None:
    answer = train_process(*tiny, *KEYS)
    assert answer.code == 0, answer.stderr
    run = tmp_path / "run"
    newest = newest_good_checkpoint(run)
    assert newest is not None
    assert is_sharded(newest)
    assert len(list(newest.glob("*.distcp"))) == 2
    whole = consolidate(str(run))
    exported, consolidated = weights(run), weights(whole)
    assert exported.keys() == consolidated.keys()
    assert all(torch.equal(exported[name], consolidated[name]) for name in exported)
    one_file = torch.load(whole / newest.name, weights_only=True)
    assert one_file["state_dict"].keys() == read_whole(newest)["state_dict"].keys()
    unbroken = losses(run)

    shutil.copytree(run, tmp_path / "again", symlinks=True)
    (tmp_path / "again" / "checkpoints" / "index.json").unlink()
    assert newest_good_checkpoint(tmp_path / "again") == tmp_path / "again" / "checkpoints" / newest.name
    shutil.copy(run / "checkpoints" / "index.json", tmp_path / "again" / "checkpoints")
    (tmp_path / "again" / "checkpoints" / newest.name / "rest.pt").write_bytes(b"damaged")
    answer = train_here("resume=again", "devices=1", "strategy=auto")
    assert answer.code == 0, answer.stderr
    assert "is damaged" in answer.stderr
    assert losses(tmp_path / "again") == pytest.approx(unbroken, abs=2e-5)
    assert read_report(tmp_path / "again")["val_loss"] == pytest.approx(read_report(run)["val_loss"], abs=1e-4)
    with pytest.raises(InputError, match="one file already"):
        consolidate(str(tmp_path / "again"))


def test_shards_need_a_strategy_that_shards(train_here: Train, tiny: list[str]) -> None:
    answer = train_here(*tiny, "steps=2", "checkpoint_format=sharded")
    assert answer.code == 2
    assert "use strategy=fsdp" in answer.stderr


def test_a_checkpoint_in_parts_is_no_model_folder_and_says_what_makes_one(train_here: Train, tmp_path: Path) -> None:
    (tmp_path / "step-000002.ckpt").mkdir()
    (tmp_path / "step-000002.ckpt" / ".metadata").touch()
    answer = train_here("init=step-000002.ckpt", "steps=2")
    assert answer.code == 2
    assert "python -m launch.consolidate step-000002.ckpt" in answer.stderr


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_sharded_run_taken_up_again_ends_with_the_same_bytes(
    optimizer: str, train_process: Train, tiny: list[str], tmp_path: Path
) -> None:
    answer = train_process(*tiny, *KEYS, f"optimizer={optimizer}", "model.dropout=0.1")
    assert answer.code == 0, answer.stderr
    shutil.copytree(tmp_path / "run", tmp_path / "again", symlinks=True)
    shutil.rmtree(newest_good_checkpoint(tmp_path / "again") or "")
    answer = train_process("resume=again")
    assert answer.code == 0, answer.stderr
    unbroken, again = (weights(tmp_path / name) for name in ("run", "again"))
    assert all(torch.equal(unbroken[name], again[name]) for name in unbroken)


@pytest.mark.chaos
def test_killed_while_ranks_write_the_last_named_checkpoint_is_whole(
    cache: Path, train_process: Train, tiny: list[str], tmp_path: Path
) -> None:
    keys = [key for key in KEYS if not key.startswith(("steps", "checkpoint_every", "validate_every"))]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *tiny, *keys, "steps=100000", "checkpoint_every=1"],
        cwd=tmp_path,
        env=environment(cache),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    folder = tmp_path / "run" / "checkpoints"
    end = time.monotonic() + 120
    while not (list(folder.glob("step-*")) and list(folder.glob(".step-*/*.distcp"))):
        assert time.monotonic() < end
    process.kill()  # its ranks die with it
    process.wait()
    newest = newest_good_checkpoint(tmp_path / "run")
    assert newest is not None
    done = step_of(newest)
    answer = train_process("resume=run", f"steps={done + 2}")
    assert answer.code == 0, answer.stderr
    assert read_report(tmp_path / "run")["steps"] == done + 2
    assert not list(folder.glob(".step-*"))


@pytest.mark.slow
def test_adapters_are_merged_where_ranks_wrote_them_in_parts(
    train_process: Train, tiny: list[str], tmp_path: Path
) -> None:
    lines = [f"{number}\t{number * 7} and {number * 11}" for number in range(240)]
    (tmp_path / "pairs.tsv").write_text("\n".join(["source\ttarget", *lines]) + "\n")
    keys = [key for key in tiny if not key.startswith(("data=", "path=", "batch_tokens"))]
    keys += ["task=finetune", "init=scratch", "model=nano", "data=pairs", f"path={tmp_path / 'pairs.tsv'}"]
    keys += ["batch_sequences=6", "task.lora.rank=4", "task.text.examples=0", "task.text.max_new_tokens=8"]
    answer = train_process(*keys, *KEYS, "optimizer=adamw", "optimizer.lr=0.1")
    assert answer.code == 0, answer.stderr
    exported, consolidated = weights(tmp_path / "run"), weights(consolidate(str(tmp_path / "run")))
    assert exported.keys() == consolidated.keys()
    assert all(torch.allclose(exported[name], consolidated[name], atol=1e-6) for name in exported)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_shards_take_up_what_one_process_wrote(
    optimizer: str, train_process: Train, train_here: Train, tiny: list[str], tmp_path: Path
) -> None:
    """The numbers of an optimizer's parameters follow its groups, not the model."""
    keys = [key for key in KEYS if not key.startswith(("devices", "strategy", "checkpoint_format"))]
    assert train_here(*tiny, *keys, f"optimizer={optimizer}").code == 0
    shutil.copytree(tmp_path / "run", tmp_path / "again", symlinks=True)
    (newest_good_checkpoint(tmp_path / "again") or tmp_path).unlink()
    answer = train_process("resume=again", "devices=2", "strategy=fsdp")
    assert answer.code == 0, answer.stderr
    tolerance = 2e-5 if optimizer == "adamw" else 2e-3  # Muon orthogonalises in bf16
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "run"), abs=tolerance)
