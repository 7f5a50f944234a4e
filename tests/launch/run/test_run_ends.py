"""The end of a run: every end of a fit saves the last state; later failures do not make it a failed run."""

import builtins
import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.loggers import Logger
from safetensors.torch import load_file

from callbacks.checkpoint import Checkpoint
from datamodules.micro_batches import TrainingStream
from gpt2lab.storage.checkpoint_ledger import checkpoint_file, checkpoint_step, newest_good_checkpoint
from gpt2lab.storage.report_json import read_report
from lightning_modules.pretrain import Pretrain
from tests.callbacks.test_callbacks import equal, metrics_without_clock
from tests.conftest import Train
from tests.support import tiny_run


class Stop(lightning.Callback):
    """Sets `trainer.should_stop` in one hook, once `micro_batches` have been trained on."""

    def __init__(self, hook: str, micro_batches: int) -> None:
        self.hook, self.micro_batches, self.seen = hook, micro_batches, 0

    def on_train_batch_end(self, trainer: Any, *_unused: Any) -> None:
        self.seen += 1
        self._maybe("on_train_batch_end", trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._maybe("on_validation_end", trainer)

    def _maybe(self, hook: str, trainer: Any) -> None:
        if hook == self.hook and self.seen >= self.micro_batches:
            trainer.should_stop = True


class FailAfterStep(lightning.Callback):
    """Raises an error in one hook once `micro_batches` have been trained on; has a state, like EarlyStopping."""

    def __init__(self, hook: str, micro_batches: int) -> None:
        self.hook, self.micro_batches, self.seen = hook, micro_batches, 0
        if hook != "on_train_batch_end":
            setattr(self, hook, self._maybe)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def on_train_batch_end(self, *_unused: Any) -> None:
        self.seen += 1
        if self.hook == "on_train_batch_end":
            self._maybe()

    def _maybe(self, *_unused: Any) -> None:
        if self.seen >= self.micro_batches:
            raise ValueError("a plot could not be drawn")


class Fail(lightning.Callback):
    """Raises an error in one hook."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self._fail)

    def _fail(self, *_unused: Any) -> None:
        raise ValueError("a plot could not be drawn")


class SignalAtEnd(lightning.Callback):
    """Sends SIGTERM to this process after the last state is saved."""

    def on_fit_end(self, *_unused: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)  # Python runs the handler


class RemoveTokenizer(lightning.Callback):
    """Breaks the export after it is written."""

    def on_train_end(self, trainer: Any, *_unused: Any) -> None:
        for file in Path(trainer.default_root_dir, "hf").glob("tokenizer*"):
            file.write_text("{}")


class FailingLogger(Logger):
    """Cannot be closed, as W&B without a network or TensorBoard on a full disk."""

    name = version = "failing"
    fails_from = 1000

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if step is not None and step >= self.fails_from:
            raise OSError("the server has gone away")

    def log_hyperparams(self, params: Any, *_unused: Any) -> None: ...

    def finalize(self, status: str) -> None:
        raise OSError("the server has gone away")


KEY = "+callbacks.end"
LIGHTNING, OURS = f"{KEY}._target_=lightning.pytorch.callbacks", f"{KEY}._target_={__name__}"
EARLY = [f"{LIGHTNING}.EarlyStopping", f"{KEY}.monitor=val/loss", f"{KEY}.stopping_threshold=100"]
ENDS: dict[str, tuple[list[str], int]] = {
    "early stopping": (EARLY, 2),
    "early stopping on two ranks": ([*EARLY, "devices=2"], 2),
    "a time limit of nothing": ([f"{LIGHTNING}.Timer", f"{KEY}.duration.seconds=0"], 0),
    "after a step": ([f"{OURS}.Stop", f"{KEY}.hook=on_train_batch_end", f"{KEY}.micro_batches=6"], 3),
    "within a step": ([f"{OURS}.Stop", f"{KEY}.hook=on_train_batch_end", f"{KEY}.micro_batches=7"], 3),
    "after a validation": ([f"{OURS}.Stop", f"{KEY}.hook=on_validation_end", f"{KEY}.micro_batches=5"], 4),
    "the last step": ([], 8),
}
VERIFIED = "callbacks.checkpoint.verify_export=true"
UNVERIFIED = "callbacks.checkpoint.verify_export=false"


@pytest.mark.parametrize("end", [pytest.param(end, marks=pytest.mark.slow) if "ranks" in end else end for end in ENDS])
def test_last_state_is_saved_at_any_end_of_fit(tmp_path: Path, tiny: list[str], train_here: Train, end: str):
    keys, steps = ENDS[end]
    own = ("steps=8", "validate_every=2", "checkpoint_every=1000", "micro_batch=4", UNVERIFIED)
    answer = train_here(*tiny, *own, "run_dir=run", *keys)
    assert answer.code == 0, answer.stderr
    run = tmp_path / "run"
    report = read_report(run)
    assert (report["status"], report["steps"]) == ("finished", steps)
    newest = newest_good_checkpoint(run)
    assert newest is not None
    assert checkpoint_step(newest) == steps
    saved = torch.load(newest, weights_only=True)["state_dict"]["backbone.lm.transformer.wte.weight"]
    assert torch.equal(load_file(run / "hf" / "model.safetensors")["transformer.wte.weight"], saved)
    assert len(answer.stdout.strip().splitlines()[-1].split(" · ")) in (1, 2)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Path, Pretrain]:
    """A run that is not interrupted, and its module."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    return folder, tiny_run.train(folder, cache)[1]


@pytest.mark.parametrize(
    ("hook", "micro_batches"),
    [
        ("on_train_batch_end", 13),
        pytest.param("on_train_batch_end", 12, marks=pytest.mark.slow),
        ("on_validation_end", 16),
    ],
)
def test_run_resumed_after_an_early_end_equals_unbroken_run(
    unbroken: tuple[Path, Pretrain], tmp_path: Path, cache: Path, hook: str, micro_batches: int
):
    """A run that ended within a step repeats it from its first micro-batch."""
    run, step = tmp_path / "run", micro_batches // 2
    folder, expected = unbroken
    tiny_run.train(run, cache, extra=[Stop(hook, micro_batches)], every=1000)
    assert read_report(run)["steps"] == step
    _, resumed = tiny_run.train(run, cache)
    assert equal(resumed, expected)
    later = [[row for row in metrics_without_clock(each) if int(row["step"]) > step] for each in (run, folder)]
    assert later[0] == later[1]


@pytest.mark.parametrize(
    ("hook", "micro_batches", "step"),
    [
        pytest.param("on_train_batch_end", 12, 6, marks=pytest.mark.slow),
        ("on_train_batch_end", 16, 8),
        ("on_validation_epoch_end", 16, 8),
        pytest.param("on_validation_batch_start", 16, 8, marks=pytest.mark.slow),
        pytest.param("on_validation_end", 16, 8, marks=pytest.mark.slow),
        pytest.param("on_train_batch_end", 13, 6, marks=pytest.mark.slow),
        ("on_train_batch_start", 14, 7),
        pytest.param("on_before_backward", 13, 6, marks=pytest.mark.slow),
        ("on_before_optimizer_step", 13, 6),
        ("on_save_checkpoint", 24, 12),
    ],
)
def test_a_step_is_saved_before_an_added_callbacks_error(
    unbroken: tuple[Path, Pretrain], tmp_path: Path, cache: Path, hook: str, micro_batches: int, step: int
):
    run, (folder, expected) = tmp_path / "run", unbroken
    with pytest.raises(ValueError, match="a plot"):
        tiny_run.train(run, cache, extra=[FailAfterStep(hook, micro_batches)], every=1000)
    newest = newest_good_checkpoint(run)
    assert newest is not None
    assert checkpoint_step(newest) == step
    _, resumed = tiny_run.train(run, cache)
    assert equal(resumed, expected)
    later = [[row for row in metrics_without_clock(each) if int(row["step"]) > step] for each in (run, folder)]
    assert later[0] == later[1]


@pytest.mark.parametrize("step", [pytest.param(6, marks=pytest.mark.slow), 8])
def test_a_step_is_saved_before_an_added_loggers_error(
    step: int, unbroken: tuple[Path, Pretrain], tmp_path: Path, cache: Path
):
    run, (folder, expected), logger = tmp_path / "run", unbroken, FailingLogger()
    logger.fails_from = step
    with pytest.raises(OSError, match="gone away"):
        tiny_run.train(run, cache, loggers=[logger], every=1000)
    newest = newest_good_checkpoint(run)
    assert newest is not None
    assert checkpoint_step(newest) == step
    _, resumed = tiny_run.train(run, cache)
    assert equal(resumed, expected)
    assert metrics_without_clock(run) == metrics_without_clock(folder)


class Exits(lightning.Callback):
    """Raises an exception after three steps, and one more; has a state that no checkpoint can hold."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def on_exception(self, *_unused: Any) -> None:
        if self.kind == "ValueError":
            raise RuntimeError("no notice could be sent")

    def state_dict(self) -> dict[str, Any]:
        return {"folder": Path("plots")}

    def on_train_batch_end(self, trainer: Any, *_unused: Any) -> None:
        if trainer.global_step == 3:
            raise vars(builtins)[self.kind]("the plot is enough")


@pytest.mark.parametrize(("kind", "code"), [("KeyboardInterrupt", 130), ("SystemExit", 1), ("ValueError", 1)])
def test_a_step_is_saved_before_a_callback_ends_the_program(
    kind: str, code: int, tmp_path: Path, tiny: list[str], train_here: Train
):
    own = ("steps=5", "checkpoint_every=1000", UNVERIFIED, "run_dir=run", f"{OURS}.Exits", f"{KEY}.kind={kind}")
    answer = train_here(*tiny, *own)
    assert answer.code == code, answer.stderr
    assert answer.stderr.strip().splitlines()[-1].endswith("python train.py resume=run")
    assert ("Traceback" in answer.stderr) == (kind == "ValueError")
    assert read_report(tmp_path / "run")["status"] == ("failed" if kind == "ValueError" else "stopped")
    assert "Checkpoints do not contain the state of Exits" in answer.stderr
    newest = newest_good_checkpoint(tmp_path / "run")
    assert newest is not None
    assert checkpoint_step(newest) == 3
    assert train_here("resume=run", "allow_targets=[tests]").code == 0


FAILING_PARTS: dict[str, tuple[type, str, int]] = {
    "the data": (TrainingStream, "__getitem__", 6),
    "a validation": (Pretrain, "validation_sums", 8),
}


@pytest.mark.parametrize("part", FAILING_PARTS)
def test_a_step_is_saved_before_a_failure_of(
    part: str, unbroken: tuple[Path, Pretrain], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of the data that vanishes, memory that is used up, a disk that is full: the run goes on from that step."""
    kind, method, step = FAILING_PARTS[part]
    run, (folder, expected), works = tmp_path / "run", unbroken, getattr(kind, method)

    def fails(self: Any, *arguments: Any) -> Any:
        if kind is not TrainingStream or arguments[0] >= 2 * step:
            raise OSError("Input/output error")
        return works(self, *arguments)

    monkeypatch.setattr(kind, method, fails)
    with pytest.raises(OSError, match="Input/output"):
        tiny_run.train(run, cache, every=1000)
    monkeypatch.undo()
    newest = newest_good_checkpoint(run)
    assert newest is not None
    assert checkpoint_step(newest) == step
    _, resumed = tiny_run.train(run, cache)
    assert equal(resumed, expected)
    assert metrics_without_clock(run) == metrics_without_clock(folder)


LATER: dict[str, tuple[list[str], str, int]] = {
    "no temporary files": ([VERIFIED], "finished", 0),
    "a callback after the fit": ([f"{OURS}.Fail", "+callbacks.end.hook=on_fit_end"], "finished", 0),
    "a callback at the end of training": ([f"{OURS}.Fail", "+callbacks.end.hook=on_train_end"], "finished", 0),
    "a callback after the last validation": ([f"{OURS}.Fail", "+callbacks.end.hook=on_validation_end"], "finished", 0),
    "a logger that cannot be closed": (
        ["logger=csv", f"logger._target_={__name__}.FailingLogger"],
        "finished",
        0,
    ),
    "an export that does not load": (
        [f"{OURS}.RemoveTokenizer", VERIFIED],
        "failed",
        1,
    ),
    "a callback with a state": (
        [f"{OURS}.FailAfterStep", f"{KEY}.hook=on_validation_end", f"{KEY}.micro_batches=1"],
        "finished",
        0,
    ),
    "a signal after the fit": (
        [f"{OURS}.SignalAtEnd"],
        "finished",
        0,
    ),
    "a callback within training": ([f"{OURS}.Fail", "+callbacks.end.hook=on_train_batch_start"], "failed", 1),
}


SLOW = ("no temporary files", "an export that does not load", "a callback at the end of training")


@pytest.mark.parametrize(
    "failure", [pytest.param(one, marks=pytest.mark.slow) if one in SLOW else one for one in LATER]
)
def test_a_failure_after_the_last_save_is_a_warning(
    tmp_path: Path, tiny: list[str], train_here: Train, monkeypatch: pytest.MonkeyPatch, failure: str
):
    keys, status, code = LATER[failure]
    off = () if VERIFIED in keys else (UNVERIFIED,)
    logger = () if any(key.startswith("logger") for key in keys) else ("logger=none",)
    own = (*(key for key in tiny if key != "logger=none"), *logger, *off)
    with monkeypatch.context() as changed:
        if failure == "no temporary files":
            changed.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
        answer = train_here(*own, "steps=2", "run_dir=run", *keys)
    assert answer.code == code, answer.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["status"], report["steps"]) == (status, 0 if "within" in failure else 2)
    if code:
        return
    assert "Traceback" not in answer.stderr
    assert newest_good_checkpoint(tmp_path / "run") is not None
    if failure != "no temporary files":
        assert answer.stderr.count("Training is complete and saved, but a later step failed") == 1
    assert "\nfinished: val/loss" in answer.stdout


class RemovesTheRun(lightning.Callback):
    """Deletes or moves the run directory once the checkpoint of a step is complete."""

    def __init__(self, step: int, moved_to: str | None = None) -> None:
        self.step, self.moved_to = step, moved_to

    def on_train_batch_start(self, trainer: lightning.Trainer, *_unused: Any) -> None:
        folder = Path(trainer.default_root_dir)
        if trainer.global_step != self.step:
            return
        next(one for one in trainer.callbacks if isinstance(one, Checkpoint))._finish_write(trainer)
        if self.moved_to:
            folder.rename(self.moved_to)
        else:
            shutil.rmtree(folder)


@pytest.mark.parametrize("moved_to", [None, "elsewhere"])
def test_a_run_whose_directory_was_deleted_can_be_resumed(
    moved_to: str | None, tmp_path: Path, tiny: list[str], train_here: Train
) -> None:
    """It ends in a new directory with its settings; a moved one can be resumed too."""
    removes = ["+callbacks.removes._target_=tests.launch.run.test_run_ends.RemovesTheRun", "+callbacks.removes.step=3"]
    keys = [
        "run_dir=run",
        "steps=6",
        "checkpoint_every=2",
        *removes,
        f"+callbacks.removes.moved_to={moved_to or 'null'}",
    ]
    answer = train_here(*tiny, *keys)
    assert answer.code == 0, answer.stderr
    assert "was deleted or moved during training" in answer.stderr
    for name in ["run", *([moved_to] if moved_to else [])]:
        answer = train_here(f"resume={name}", "steps=8", "allow_targets=[tests]")
        assert answer.code == 0, answer.stderr
        assert newest_good_checkpoint(tmp_path / name) == checkpoint_file(tmp_path / name, 8)
