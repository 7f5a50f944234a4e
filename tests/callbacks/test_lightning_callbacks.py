"""Callbacks and loggers of Lightning, added on the command line as its users know them."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from gpt2lab.storage.checkpoint_ledger import commit_checkpoint, newest_good_checkpoint, scratch_file
from gpt2lab.storage.metrics_csv import read_metrics
from gpt2lab.storage.report_json import read_report
from launch.checks import checks
from launch.config import run_spec
from launch.config.schema import RunConfig
from tests.conftest import Train
from tests.support.configurations import composed

LIGHTNING = "lightning.pytorch.callbacks"
ADDED = f"callbacks.my._target_={LIGHTNING}"
# class → its keys as they are typed
CALLBACKS = {
    "EarlyStopping": ["callbacks.my.monitor=val/loss", "callbacks.my.patience=1"],
    "LearningRateMonitor": ["callbacks.my.logging_interval=step"],
    "DeviceStatsMonitor": ["callbacks.my.cpu_stats=true"],
    "RichModelSummary": ["callbacks.my.max_depth=2"],
    "Timer": ["callbacks.my.duration=00:01:00:00"],
    "ModelCheckpoint": ["callbacks.my.monitor=val/loss", "callbacks.my.save_top_k=1"],
    "OnExceptionCheckpoint": ["callbacks.my.dirpath='${run_dir}/best'"],
}
QUICK = ("EarlyStopping", "LearningRateMonitor", "ModelCheckpoint")


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = newest_good_checkpoint(run)
    assert newest is not None
    return torch.load(newest, weights_only=True)["state_dict"]


def assert_same_weights(one: Path, other: Path) -> None:
    pairs = zip(weights(one).values(), weights(other).values(), strict=True)
    assert all(torch.equal(first, second) for first, second in pairs)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CALLBACKS]
)
def test_a_callback_of_lightning_works_and_resumes(name: str, train_here: Train, tiny: list[str], tmp_path: Path):
    keys = [*tiny, "validate_every=2", "log_every=1", "threads=1", "seed=1", "compile=false"]
    assert train_here(*keys, "steps=6", "run_dir=plain").code == 0
    answer = train_here(*keys, f"{ADDED}.{name}", *CALLBACKS[name], "steps=6", "checkpoint_every=2", "run_dir=run")
    assert answer.code == 0, answer.stderr
    assert_same_weights(tmp_path / "run", tmp_path / "plain")
    columns = read_metrics(tmp_path / "run")[-1]
    if name == "LearningRateMonitor":
        assert any(column.startswith("lr-") for column in columns)
    if name == "DeviceStatsMonitor":
        assert any("DeviceStatsMonitor" in column for column in columns)
    if name == "RichModelSummary":
        assert "params" in answer.stdout + answer.stderr
    (tmp_path / "run" / "checkpoints" / "step-000006.ckpt").unlink()  # as if it had been killed after step 4
    resumed = train_here("resume=run")
    assert resumed.code == 0, resumed.stderr
    assert read_report(tmp_path / "run")["steps"] == 6
    assert_same_weights(tmp_path / "run", tmp_path / "plain")


def test_early_stopping_resumes_with_its_last_state(train_here: Train, tiny: list[str], tmp_path: Path):
    """The loss falls, so with mode=max no later validation is better and patience ends with the third."""
    keys = [*tiny, "validate_every=2", "checkpoint_every=2", "steps=12", f"{ADDED}.EarlyStopping"]
    keys += ["callbacks.my.monitor=val/loss", "callbacks.my.mode=max", "callbacks.my.patience=2"]
    assert train_here(*keys, "run_dir=run").code == 0
    assert read_report(tmp_path / "run")["steps"] == 6
    (tmp_path / "run" / "checkpoints" / "step-000006.ckpt").unlink()  # as if it had been killed after step 4
    assert train_here("resume=run").code == 0
    assert read_report(tmp_path / "run")["steps"] == 6


def test_model_checkpoint_writes_below_the_run_directory(train_here: Train, tiny: list[str], tmp_path: Path):
    keys = [*tiny, "validate_every=2", f"{ADDED}.ModelCheckpoint", "callbacks.my.monitor=val/loss", "steps=4"]
    answer = train_here(*keys, "run_dir=default")
    assert answer.code == 0, answer.stderr
    (file,) = (tmp_path / "default" / "lightning" / "checkpoints").iterdir()
    assert torch.load(file, weights_only=True)["global_step"] in (2, 4)
    named = ["callbacks.my.dirpath=${run_dir}/best", "callbacks.my.filename={step}", "callbacks.my.save_top_k=-1"]
    answer = train_here(*keys, *named, "run_dir=named")
    assert answer.code == 0, answer.stderr
    assert sorted(file.name for file in (tmp_path / "named" / "best").iterdir()) == ["step=2.ckpt", "step=4.ckpt"]
    assert {file.name for file in (tmp_path / "named" / "checkpoints").glob("step*")} >= {"step-000004.ckpt"}
    (tmp_path / "named").rename(tmp_path / "moved")
    answer = train_here("resume=moved", "steps=6", "devices=1")
    assert answer.code == 0, answer.stderr
    assert (tmp_path / "moved" / "best" / "step=6.ckpt").is_file()
    assert not (tmp_path / "named").exists()


def test_model_checkpoint_removes_no_file_of_another_folder(train_here: Train, tiny: list[str], tmp_path: Path):
    """A checkpoint names the files that the callback removes later; a downloaded one may name any."""
    keys = [*tiny, "validate_every=2", "checkpoint_every=2", f"{ADDED}.ModelCheckpoint"]
    keys += ["callbacks.my.monitor=val/loss"]
    assert train_here(*keys, "steps=2", "run_dir=run").code == 0
    victim = tmp_path / "victim"
    victim.mkdir()
    newest = newest_good_checkpoint(tmp_path / "run")
    assert newest is not None
    checkpoint = torch.load(newest, weights_only=True)
    (state,) = (state for name, state in checkpoint["callbacks"].items() if name.startswith("ModelCheckpoint"))
    outside = f"{state['dirpath']}/../../../victim"
    state.update(best_k_models={outside: torch.tensor(99.0)}, kth_best_model_path=outside, kth_value=torch.tensor(99.0))
    torch.save(checkpoint, scratch_file(tmp_path / "run", 2))
    commit_checkpoint(tmp_path / "run", 2, keep_last=1)
    answer = train_here("resume=run", "steps=4")
    assert answer.code == 0, answer.stderr
    assert "outside the run directory" in answer.stderr
    assert victim.is_dir()


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_a_callback_is_added_with_and_without_a_plus(plus: str):
    config = composed(f"{plus}callbacks.my._target_={LIGHTNING}.Timer", "callbacks.my.duration=00:01:00:00")
    assert config.callbacks["my"] == {"_target_": f"{LIGHTNING}.Timer", "duration": "00:01:00:00"}
    assert list(config.callbacks)[-1] == "my"
    checks.check(config)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{ADDED}.StochasticWeightAveraging callbacks.my.swa_lrs=0.01", "Use ema=0.999 instead"),
        (f"{ADDED}.RichProgressBar", "Use callbacks.progress instead"),
        (f"{ADDED}.EarlyStopping callbacks.my.monitor=val_loss", "did you mean val/loss?"),
        (f"{ADDED}.EarlyStopping callbacks.my.monitr=val/loss", "no key callbacks.my.monitr (did you mean monitor?)"),
        (f"{ADDED}.EarlyStoping", "no such class"),
        (f"{ADDED}.EarlyStopping", "missing a required argument: 'monitor'"),
        (f"{ADDED}.Timer +callbacks.my._partial_=true", "_partial_ is not supported"),
        ("callbacks.my.duration=3", "no key callbacks.my"),
        ("callbacks=samples", "Allowed: benchmarks, default, inspect, layer_stats, minimal"),
        ("callbacks=parts/samples", "Allowed: benchmarks, default, inspect, layer_stats, minimal"),
        ("logger.x._target_=lightning.pytorch.loggers.CSVLogger logger.x.save_dr=x", "did you mean save_dir?"),
    ],
)
def test_a_callback_that_does_not_work_is_refused(words: str, message: str, train_here: Train, tiny: list[str]):
    answer = train_here(*(key for key in tiny if not key.startswith("callbacks")), *words.split(), "steps=2")
    assert answer.code == 2, answer.stderr
    assert message in answer.stderr
    assert len(answer.stderr.strip().splitlines()) <= 5
    assert not Path("runs").exists() or not list(Path("runs").rglob("config.yaml"))


@pytest.mark.parametrize(
    "logger", ["csv", pytest.param("none", marks=pytest.mark.slow), pytest.param("tensorboard", marks=pytest.mark.slow)]
)
def test_lightning_loggers_are_added_to_ours(logger: str, train_here: Train, tiny: list[str], tmp_path: Path):
    loggers = ["logger.tb._target_=lightning.pytorch.loggers.TensorBoardLogger", "logger.tb.save_dir=${run_dir}/tb"]
    loggers += ["logger.table._target_=lightning.pytorch.loggers.CSVLogger", "logger.table.save_dir=${run_dir}/table"]
    keys = [key for key in tiny if not key.startswith("logger")]
    answer = train_here(*keys, f"logger={logger}", *loggers, "steps=2", "log_every=1", "run_dir=run")
    assert answer.code == 0, answer.stderr
    run = tmp_path / "run"
    assert list((run / "tb").rglob("events.*"))
    assert list((run / "table").rglob("metrics.csv"))
    assert read_metrics(run)
    assert (run / "tensorboard").is_dir() is (logger == "tensorboard")
    answer = train_here("resume=run", "steps=3")
    assert answer.code == 0, answer.stderr


# References to keys


def test_interpolated_arguments_are_stored_with_their_value():
    config = composed("sample_every=7", "logger=tensorboard")
    assert config.callbacks["samples"]["every"] == 7
    references = config.invocation.references
    assert references["callbacks.samples.every"] == "${sample_every}"
    assert references["logger.run_dir"] == "${run_dir}"
    literal = composed("sample_every=7", "callbacks.samples.every=3").invocation.references
    assert "callbacks.samples.every" not in literal
    assert run_spec.from_yaml(RunConfig, run_spec.to_yaml(config), "here") == config


def test_resume_updates_interpolated_but_not_literal_arguments(train_here: Train, tiny: list[str], tmp_path: Path):
    keys = [*tiny, "checkpoint_every=2", "steps=2", "threads=1"]
    assert train_here(*keys, "run_dir=follows").code == 0
    assert train_here(*keys, "callbacks.checkpoint.every=2", "run_dir=literal").code == 0
    for run, steps in (("follows", [6, 9]), ("literal", [8, 9])):
        answer = train_here(f"resume={run}", "steps=9", "checkpoint_every=3")
        assert answer.code == 0, answer.stderr
        files = sorted((tmp_path / run / "checkpoints").glob("step-*.ckpt"))
        assert [int(re.findall(r"\d+", file.name)[0]) for file in files] == steps
    stored = yaml.safe_load((tmp_path / "follows" / "config.yaml").read_text())["config"]
    assert stored["callbacks"]["checkpoint"]["every"] == 3


def test_text_of_the_user_is_not_interpolated_again(train_here: Train, tiny: list[str], tmp_path: Path):
    prompts = r"callbacks.samples.prompts=['\${steps}','\${oc.env:HOME}','\\\${seed}','a\$b']"
    keys = [key for key in tiny if not key.startswith("callbacks")]
    wide = ["callbacks.checkpoint.verify_export=false", "callbacks.samples.max_new_tokens=4", "sample_every=1"]
    assert train_here(*keys, *wide, prompts, "steps=1", "run_dir=run").code == 0
    answer = train_here("resume=run", "steps=2", "sample_every=2")
    assert answer.code == 0, answer.stderr
    lines = (tmp_path / "run" / "samples.jsonl").read_text()
    assert all(text in lines for text in ("${steps}", "${oc.env:HOME}", "${seed}"))


# Lightning's limits of an epoch; two micro-batches are a step

LIMITED = ["micro_batch=4", "log_every=1", "steps=6", "validate_every=3", "checkpoint_every=2"]


@pytest.mark.parametrize("limit", ["trainer.limit_train_batches=4", "trainer.overfit_batches=4"])
def test_limited_batches_give_true_losses_and_resume(limit: str, train_here: Train, tiny: list[str], tmp_path: Path):
    """Epochs of two steps: a limit continues the data order, overfitting repeats the first two steps' batches."""
    answer = train_here(*tiny, *LIMITED, limit, "run_dir=run")
    assert answer.code == 0, answer.stderr
    assert train_here(*tiny, *LIMITED, "run_dir=plain").code == 0
    assert "overfit" in limit or losses(tmp_path / "run") == losses(tmp_path / "plain")
    assert losses(tmp_path / "run")[:2] == losses(tmp_path / "plain")[:2]
    shutil.copytree(tmp_path / "run", tmp_path / "again", symlinks=True)
    (tmp_path / "again" / "checkpoints" / "step-000006.ckpt").unlink()  # as if it had been killed after step 4
    assert train_here("resume=again").code == 0
    assert_same_weights(tmp_path / "again", tmp_path / "run")
    assert losses(tmp_path / "again") == losses(tmp_path / "run")


def losses(run: Path) -> list[str]:
    return [row["train/loss"] for row in read_metrics(run) if row["train/loss"]]


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("trainer.limit_train_batches=3", "Give a multiple of 2"),
        ("trainer.limit_train_batches=0.5", "endless stream"),
        ("trainer.overfit_batches=1", "Give a multiple of 2"),
        ("trainer.overfit_batches=0.5", "endless stream"),
    ],
)
def test_a_limit_within_a_step_is_refused(limit: str, words: str, train_here: Train, tiny: list[str], tmp_path: Path):
    answer = train_here(*tiny, *LIMITED, limit, "run_dir=run")
    assert answer.code == 2, answer.stderr
    assert words in answer.stderr
    assert not (tmp_path / "run").exists()


def test_fast_dev_run_counts_steps(train_here: Train, tiny: list[str], tmp_path: Path):
    answer = train_here(*tiny, *LIMITED, "trainer.fast_dev_run=2", "run_dir=run")
    assert answer.code == 0, answer.stderr
    assert read_report(tmp_path / "run")["steps"] == 2
