"""Sharded checkpoints: written atomically, resumed by any number of ranks, consolidated into one file by a command."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import evaluate
from gpt2lab.errors import InputError
from gpt2lab.storage.checkpoint_ledger import checkpoint_step, newest_good_checkpoint
from gpt2lab.storage.metrics_csv import read_metrics
from gpt2lab.storage.model_folder import read_pair_template
from gpt2lab.storage.report_json import read_report
from gpt2lab.storage.sharded_checkpoint import is_sharded
from launch.commands.consolidate import consolidate
from launch.exit_codes import exit_code
from tests.conftest import ROOT, SHRUNK, Answer, Train, environment

KEYS = ("steps=4", "checkpoint_every=2", "validate_every=4", "log_every=1", "ema=0.5", "schedule.warmup_steps=2")
KEYS += ("devices=2", "strategy=fsdp", "checkpoint_format=sharded", "run_dir=run")
STANDING_STILL = ["steps=1", "optimizer=adamw", "optimizer.lr=1e-30", "optimizer.weight_decay=0", "run_dir=started"]

WITNESS = """
from pathlib import Path
import lightning
import torch

class Witness(lightning.Callback):
    def on_train_end(self, trainer, pl_module):
        if trainer.world_size == 1:
            return
        (optimizer,), moments = trainer.optimizers, []
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            of = optimizer.state[parameter].items()
            moments.append({what: value.full_tensor() for what, value in of if value.ndim})
        weights = {name: parameter.full_tensor() for name, parameter in pl_module.named_parameters()}
        if trainer.is_global_zero:
            torch.save([weights, moments], Path(trainer.default_root_dir) / "witness.pt")
"""


@dataclass
class Consolidated:
    """A run of two ranks, the result of the command that consolidated its newest checkpoint, and the files written."""

    run: Path
    answer: Answer
    folder: Path
    file: Path


def consolidated(folder: Path, cache: Path, *words: str) -> Answer:
    """Run the command of a user in the folder of the project."""
    command = [sys.executable, "-m", "launch.commands.consolidate", *words]
    variables = {**environment(cache), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    return Answer(ended.returncode, ended.stdout, ended.stderr)


def losses(folder: Path) -> dict[str, float]:
    return {row["step"]: float(row["train/loss"]) for row in read_metrics(folder) if row.get("train/loss")}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "hf" / "model.safetensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, cache: Path, sources: Path) -> Consolidated:
    """Train with a callback, independent of checkpoints, that saves the weights and moments at the end of each rank."""
    folder = tmp_path_factory.mktemp("parts")
    (folder / "witness.py").write_text(WITNESS)
    keys = [*SHRUNK, f"path={sources}", *KEYS, "+callbacks.witness._target_=witness.Witness"]
    command, variables = [sys.executable, str(ROOT / "train.py"), *keys], {"PYTHONPATH": str(folder)}
    ended = subprocess.run(command, cwd=folder, env=environment(cache) | variables, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    answer = consolidated(folder, cache, "run")
    whole = folder / "run" / "consolidated"
    return Consolidated(folder / "run", answer, whole, whole / "step-000004.ckpt")


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.slow
def test_consolidate_writes_the_weights_and_moments_of_all_ranks(made: Consolidated) -> None:
    assert made.answer.code == 0, made.answer.stderr
    assert made.answer.stdout == "run/consolidated/hf\n"
    assert sorted(path.name for path in made.folder.iterdir()) == ["hf", "step-000004.ckpt"]
    whole = torch.load(made.file, weights_only=True)
    ended_with, moments = torch.load(made.run / "witness.pt", weights_only=True)
    ended_with["backbone.lm.lm_head.weight"] = ended_with["backbone.lm.transformer.wte.weight"]
    assert_equal(whole["state_dict"], ended_with)
    (optimizer,) = whole["optimizer_states"]
    numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
    assert len(numbers) == len(optimizer["state"]) == len(moments)
    for number, expected in zip(numbers, moments, strict=True):
        assert expected
        assert_equal({what: value for what, value in optimizer["state"][number].items() if value.ndim}, expected)
    assert_equal(weights(made.folder), weights(made.run))  # of the averaged weights, which the run has exported


@pytest.mark.slow
def test_consolidated_folder_works_as_init_and_teacher(
    made: Consolidated,
    train_here: Train,
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    keys = [key for key in tiny if not key.startswith(("model", "vocab_size"))]
    answer = train_here(*keys, "model=auto", f"init={made.folder}", *STANDING_STILL)
    assert answer.code == 0, answer.stderr
    assert_equal(weights(tmp_path / "started"), weights(made.run))
    taught = ["task=distill", f"teacher={made.folder}", "preflight=off", "steps=1", "run_dir=taught"]
    answer = train_here(*tiny, *taught)
    assert answer.code == 0, answer.stderr
    assert read_report(tmp_path / "taught")["teacher"]["source"] == str(made.folder / "hf")
    scores = []
    for checkpoint in (made.folder, made.run):
        text = next(word for word in tiny if word.startswith("path="))
        words = [f"checkpoint={checkpoint}", "data=text", text, "context=32", "json=scores.json"]
        monkeypatch.setattr(sys, "argv", [str(ROOT / "evaluate.py"), *words])
        assert exit_code(evaluate.main) == 0, capfd.readouterr().err
        scores.append(json.loads((tmp_path / "scores.json").read_text())["loss"])
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_resume_from_the_consolidated_file_equals_the_shards(
    made: Consolidated, train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(made.run.parent)
    for name in ("parts", "whole"):
        shutil.copytree(made.run, tmp_path / name, symlinks=True)
    shutil.rmtree(tmp_path / "whole" / "checkpoints")
    (tmp_path / "whole" / "checkpoints").mkdir()
    shutil.copy(made.file, tmp_path / "whole" / "checkpoints")
    newest = newest_good_checkpoint(tmp_path / "whole")
    assert newest is not None
    assert newest.is_file()
    for name in ("parts", "whole"):
        answer = train_here(
            f"resume={name}",
            "devices=1",
            "allow_targets=[witness]",
            "strategy=auto",
            "checkpoint_format=single",
            "steps=6",
        )
        assert answer.code == 0, answer.stderr
    assert read_report(tmp_path / "whole")["steps"] == 6
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert not torch.equal(
        weights(tmp_path / "whole")["transformer.wte.weight"], weights(made.run)["transformer.wte.weight"]
    )


@pytest.mark.parametrize(
    ("words", "message"), [([], "Give one run directory"), (["nowhere"], "neither a run directory")]
)
def test_consolidate_refuses_other_folders_in_one_line(
    words: list[str], message: str, tmp_path: Path, cache: Path
) -> None:
    answer = consolidated(tmp_path, cache, *words)
    assert answer.code == 2
    assert answer.stderr.startswith("error: ")
    assert message in answer.stderr


@pytest.mark.slow
def test_one_rank_resumes_from_the_last_undamaged_shards_of_two(
    made: Consolidated, train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(made.run.parent)
    run = made.run
    newest = newest_good_checkpoint(run)
    assert newest is not None
    assert is_sharded(newest)
    assert len(list(newest.glob("*.distcp"))) == 2
    shutil.copytree(run, tmp_path / "again", symlinks=True)
    (tmp_path / "again" / "checkpoints" / "index.json").unlink()
    assert newest_good_checkpoint(tmp_path / "again") == tmp_path / "again" / "checkpoints" / newest.name
    shutil.copy(run / "checkpoints" / "index.json", tmp_path / "again" / "checkpoints")
    (tmp_path / "again" / "checkpoints" / newest.name / "rest.pt").write_bytes(b"damaged")
    answer = train_here("resume=again", "allow_targets=[witness]", "devices=1", "strategy=auto")
    assert answer.code == 0, answer.stderr
    assert "is damaged" in answer.stderr
    assert losses(tmp_path / "again") == pytest.approx(losses(run), abs=2e-5)
    assert read_report(tmp_path / "again")["val_loss"] == pytest.approx(read_report(run)["val_loss"], abs=1e-4)
    with pytest.raises(InputError, match="a single file already"):
        consolidate(str(tmp_path / "again"))


def test_shards_need_a_strategy_that_shards(train_here: Train, tiny: list[str]) -> None:
    answer = train_here(*tiny, "steps=2", "checkpoint_format=sharded")
    assert answer.code == 2
    assert "use strategy=fsdp" in answer.stderr


def test_sharded_checkpoint_as_init_names_consolidate(train_here: Train, tmp_path: Path) -> None:
    (tmp_path / "step-000002.ckpt").mkdir()
    (tmp_path / "step-000002.ckpt" / ".metadata").touch()
    answer = train_here("init=step-000002.ckpt", "steps=2")
    assert answer.code == 2
    assert "python -m launch.commands.consolidate step-000002.ckpt" in answer.stderr


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_sharded_run_equals_unbroken_run(
    optimizer: str, train_process: Train, tiny: list[str], tmp_path: Path
) -> None:
    answer = train_process(*tiny, *KEYS, f"optimizer={optimizer}", "model.dropout=0.1")
    assert answer.code == 0, answer.stderr
    shutil.copytree(tmp_path / "run", tmp_path / "again", symlinks=True)
    shutil.rmtree(newest_good_checkpoint(tmp_path / "again") or "")
    answer = train_process("resume=again", "allow_targets=[witness]")
    assert answer.code == 0, answer.stderr
    unbroken, again = (weights(tmp_path / name) for name in ("run", "again"))
    assert all(torch.equal(unbroken[name], again[name]) for name in unbroken)


def shards_being_written(folder: Path) -> list[Path]:
    try:
        return list(folder.glob(".step-*/*.distcp"))
    except FileNotFoundError:  # renamed meanwhile
        return []


@pytest.mark.chaos
def test_kill_while_ranks_save_leaves_a_whole_checkpoint(
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
    while not (list(folder.glob("step-*")) and shards_being_written(folder)):
        assert time.monotonic() < end
    process.kill()  # its ranks end with it
    process.wait()
    newest = newest_good_checkpoint(tmp_path / "run")
    assert newest is not None
    done = checkpoint_step(newest)
    answer = train_process("resume=run", f"steps={done + 2}")
    assert answer.code == 0, answer.stderr
    assert read_report(tmp_path / "run")["steps"] == done + 2
    assert not list(folder.glob(".step-*"))


FULL = """
import resource
import lightning

class Full(lightning.Callback):
    def on_train_start(self, trainer, pl_module):
        if trainer.global_rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
"""


@pytest.mark.chaos
def test_full_disk_of_one_rank_is_reported(
    train_process: Train, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full.py").write_text(FULL)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answer = train_process(*tiny, *KEYS, "+callbacks.full._target_=full.Full")
    assert answer.code == 2, answer.stderr
    assert answer.stderr.splitlines() == [
        "error: No space left to write the checkpoint of step 2, run/checkpoints/step-000002.ckpt: File too large.",
        "The run has no checkpoint yet. Free some space and start it again.",
    ]
    assert newest_good_checkpoint(tmp_path / "run") is None


@pytest.mark.slow
def test_lora_adapters_are_merged_from_shards(train_process: Train, tiny: list[str], tmp_path: Path) -> None:
    lines = [f"{number}\t{number * 7} and {number * 11}" for number in range(240)]
    (tmp_path / "pairs.tsv").write_text("\n".join(["source\ttarget", *lines]) + "\n")
    assert train_process(*tiny, "steps=1", "compile=false", "run_dir=begun").code == 0
    keys = [key for key in tiny if not key.startswith(("data=", "path=", "batch_tokens", "model.", "vocab_size"))]
    keys += ["task=finetune", "init=begun", "data=pairs", f"path={tmp_path / 'pairs.tsv'}"]
    keys += ["batch_sequences=6", "task.lora.rank=4", "task.text.examples=0", "task.text.max_new_tokens=8"]
    answer = train_process(*keys, *KEYS, "optimizer=adamw", "optimizer.lr=0.1")
    assert answer.code == 0, answer.stderr
    exported, consolidated = weights(tmp_path / "run"), weights(consolidate(str(tmp_path / "run")))
    assert exported.keys() == consolidated.keys()
    assert all(torch.allclose(exported[name], consolidated[name], atol=1e-6) for name in exported)
    templates = [read_pair_template(tmp_path / folder) for folder in ("run/hf", "run/consolidated/hf")]
    assert templates == [{"prompt": "{source}\n\n", "response": "{target}"}] * 2


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_sharded_run_resumes_from_a_single_file(
    optimizer: str, train_process: Train, train_here: Train, tiny: list[str], tmp_path: Path
) -> None:
    """An optimizer numbers its parameters by its groups, not by the model."""
    keys = [key for key in KEYS if not key.startswith(("devices", "strategy", "checkpoint_format"))]
    assert train_here(*tiny, *keys, f"optimizer={optimizer}").code == 0
    shutil.copytree(tmp_path / "run", tmp_path / "again", symlinks=True)
    (newest_good_checkpoint(tmp_path / "again") or tmp_path).unlink()
    answer = train_process("resume=again", "allow_targets=[witness]", "devices=2", "strategy=fsdp")
    assert answer.code == 0, answer.stderr
    tolerance = 2e-5 if optimizer == "adamw" else 2e-3  # Muon orthogonalizes in bf16
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "run"), abs=tolerance)
