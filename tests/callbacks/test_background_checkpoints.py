"""Checkpoints written in another thread while training continues: the same content, and errors that are not lost."""

import errno
import signal
import threading
import traceback
from collections import OrderedDict
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import numpy as np
import pytest
import torch

import callbacks.checkpoint
from callbacks.checkpoint_io import BackgroundWrite
from callbacks.interrupt import StoppedNowError
from gpt2lab.errors import InputError
from gpt2lab.reports.model_card import read_step
from gpt2lab.storage.checkpoint_ledger import checkpoint_file, newest_good_checkpoint, read_entries
from gpt2lab.storage.report_json import read_report
from gpt2lab.storage.tensor_file import copy_to_cpu, read_checkpoint_file, write_tensor_file
from tests.support import tiny_run

LONGEST_WAIT = 60  # seconds, after which training has waited for a write that waits for training


class AfterStep(lightning.Callback):
    """Sets an event once a step is complete, before the callbacks that follow in the list."""

    def __init__(self, step: int) -> None:
        self.step, self.is_over = step, threading.Event()

    def on_train_batch_end(self, trainer: lightning.Trainer, *_unused: Any) -> None:
        if trainer.global_step >= self.step:
            self.is_over.set()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def content(run: Path, step: int) -> dict[str, Any]:
    """The tensors of a checkpoint by their place in it."""
    stored, found = read_checkpoint_file(checkpoint_file(run, step)), {}

    def add(value: Any, place: str) -> None:
        if isinstance(value, torch.Tensor):
            found[place] = value
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, one in items:
            add(one, f"{place}/{key}")

    add(stored, "")
    return found


def test_training_continues_while_a_checkpoint_is_written(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The file and the export of step 4 are written after step 6, and hold step 4."""
    later, waited = AfterStep(6), []

    def write_later(held: Any, path: Path) -> None:
        waited.append(later.is_over.wait(LONGEST_WAIT))
        write_tensor_file(held, path)

    tiny_run.train(tmp_path / "at once", cache, steps=8)
    with monkeypatch.context() as patch:
        patch.setattr(callbacks.checkpoint, "write_tensor_file", write_later)
        tiny_run.train(tmp_path / "later", cache, steps=8, extra=[later])
    assert waited == [True, True]
    expected, written = content(tmp_path / "at once", 4), content(tmp_path / "later", 4)
    assert expected.keys() == written.keys()
    assert len(expected) > 50
    for place, tensor in expected.items():
        assert torch.equal(tensor, written[place]), place
    assert [entry.step for entry in read_entries(tmp_path / "later")] == [4, 8]
    assert read_step(tmp_path / "later" / "hf") == 8


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("broken")])
def test_a_failed_write_ends_the_run_after_the_next_step(
    error: Exception, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def failing(held: Any, path: Path) -> None:
        if path.name == ".step-000008.ckpt.tmp":
            raise error
        write_tensor_file(held, path)

    monkeypatch.setattr(callbacks.checkpoint, "write_tensor_file", failing)
    is_full = isinstance(error, OSError)
    message = "No space left to write the checkpoint of step 8" if is_full else "broken"
    with pytest.raises(InputError if is_full else RuntimeError, match=message):
        tiny_run.train(tmp_path, cache, steps=400)
    assert newest_good_checkpoint(tmp_path) == checkpoint_file(tmp_path, 4)
    assert read_step(tmp_path / "hf") == 4
    assert not list(tmp_path.rglob("*.tmp"))
    report = read_report(tmp_path)
    assert report["status"] == "failed"
    assert report["steps"] < 400


def test_the_checkpoint_being_written_is_kept_when_the_run_fails(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    later = AfterStep(5)

    def write_later(held: Any, path: Path) -> None:
        later.is_over.wait(LONGEST_WAIT)
        write_tensor_file(held, path)

    class Breaks(AfterStep):
        def on_train_batch_start(self, trainer: lightning.Trainer, *_unused: Any) -> None:
            if trainer.global_step == self.step:
                later.is_over.set()
                raise BaseExceptionGroup("stopped by hand", [KeyboardInterrupt()])

    monkeypatch.setattr(callbacks.checkpoint, "write_tensor_file", write_later)
    with pytest.raises(BaseExceptionGroup, match="stopped by hand"):
        tiny_run.train(tmp_path, cache, steps=8, extra=[Breaks(5)])
    assert checkpoint_file(tmp_path, 4) in [checkpoint_file(tmp_path, entry.step) for entry in read_entries(tmp_path)]


def test_a_copy_keeps_shared_memory_and_nothing_of_the_original():
    weight = torch.arange(6.0)
    state = OrderedDict(weight=weight, tied=weight, part=weight[2:4].view(1, 2), empty=torch.empty(0, 3))
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    nested = {"numbers": [1, 2.5, None, "text"], "set": {1}}
    copied = copy_to_cpu({"state": state, "inner": ({"half": weight.half()},), **nested})
    weight.zero_()
    nested["numbers"].append(3)  # type: ignore[attr-defined]
    kept = copied["state"]
    assert kept["weight"].tolist() == [0, 1, 2, 3, 4, 5]
    assert kept["weight"].data_ptr() == kept["tied"].data_ptr()
    assert kept["part"].tolist() == [[2, 3]]
    assert kept["part"].untyped_storage().data_ptr() == kept["weight"].data_ptr()
    assert (kept["empty"].shape, copied["inner"][0]["half"].dtype) == ((0, 3), torch.float16)
    assert kept._metadata == {"": {"version": 1}}
    assert (copied["numbers"], copied["set"]) == ([1, 2.5, None, "text"], {1})


@pytest.mark.parametrize("order", [("part", "whole"), ("whole", "part")])
def test_a_copy_keeps_two_tensors_over_one_numpy_array(order: tuple[str, str]):
    array = np.arange(6.0)
    over = {"part": torch.from_numpy(array[:2]), "whole": torch.from_numpy(array)}
    copied = copy_to_cpu({name: over[name] for name in order})
    assert copied["part"].tolist() == [0, 1]
    assert copied["whole"].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_copy_keeps_a_conjugate_and_a_sign_not_applied():
    numbers = torch.tensor([1 + 2j, 3 - 4j])
    copied = copy_to_cpu({"conjugate": numbers.conj(), "negative": numbers.conj().imag})
    assert copied["conjugate"].tolist() == [1 - 2j, 3 + 4j]
    assert copied["negative"].tolist() == [-2, 4]


@pytest.mark.filterwarnings("ignore:.*quantized tensor:UserWarning")
def test_a_copy_keeps_the_scale_of_a_quantized_tensor():
    quantized = torch.quantize_per_tensor(torch.tensor([1.0, 2.5]), 0.5, 0, torch.quint8)
    assert copy_to_cpu([quantized])[0].dequantize().tolist() == [1, 2.5]


def test_a_write_is_waited_for_again_after_an_interrupt():
    """As by a second Ctrl-C during the wait: the write goes on, and its error is not lost."""
    is_interrupted, sends_no_more, writing = threading.Event(), threading.Event(), BackgroundWrite()

    def interrupt(_number: int, frame: FrameType | None) -> None:
        callers = {one.f_code for one, _ in traceback.walk_stack(frame)}
        is_blocked = frame is not None and "saved_state" in frame.f_locals  # a lock is held: Condition.wait waits
        if is_blocked and BackgroundWrite.wait.__code__ in callers and not is_interrupted.is_set():
            is_interrupted.set()
            raise StoppedNowError

    def write() -> None:
        while not is_interrupted.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
        sends_no_more.set()
        raise OSError("Input/output error")

    previous = signal.signal(signal.SIGUSR2, interrupt)
    try:
        writing.start(write)
        with pytest.raises(StoppedNowError):
            writing.wait()
        assert writing.is_pending
        with pytest.raises(OSError, match="Input/output error"):
            writing.wait()
    finally:
        sends_no_more.wait(LONGEST_WAIT)
        signal.signal(signal.SIGUSR2, previous)
    assert not writing.is_pending


def test_the_error_of_a_write_is_raised_once():
    def failing() -> None:
        raise OSError("Input/output error")

    writing = BackgroundWrite()
    writing.wait()
    writing.start(failing)
    with pytest.raises(OSError, match="Input/output error"):
        writing.wait()
    assert not writing.is_pending
    assert not writing.has_failed
    writing.wait()
