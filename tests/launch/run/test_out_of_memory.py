"""Out of memory: the message names micro_batch, and a run that has saved continues with a smaller one."""

import errno
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from gpt2lab.storage.report_json import read_report
from gpt2lab.system.out_of_memory import out_of_memory_reason
from tests.conftest import Train

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1 GiB is free."
CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
CPU += "4294967296 bytes. Error code 12 (Cannot allocate memory)"


class Allocate(lightning.Callback):
    """Requests a petabyte after `step` steps, in training or in validation."""

    def __init__(self, step: int, in_validation: bool = False) -> None:
        self.step, self.in_validation = step, in_validation

    def on_train_batch_start(self, trainer: Any, *_unused: Any) -> None:
        self._allocate(trainer, not self.in_validation)

    def on_validation_batch_start(self, trainer: Any, *_unused: Any) -> None:
        self._allocate(trainer, self.in_validation)

    def _allocate(self, trainer: Any, is_due: bool) -> None:
        if is_due and trainer.global_step == self.step:
            torch.empty(2**50, dtype=torch.uint8)


def wrapped(error: Exception) -> Exception:
    """An error behind another one, as torch.compile raises it."""
    try:
        raise ValueError("backend failed") from error
    except ValueError as outer:
        return outer


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError(CUDA), "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"),
        (RuntimeError(CPU), "can't allocate memory: you tried to allocate 4294967296 bytes"),
        (RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"), "CUDA error: out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "CUBLAS_STATUS_ALLOC_FAILED"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), "MPS backend out of memory"),
        (MemoryError(), "no free memory"),
        (MemoryError("Unable to allocate 3.2 GiB for an array"), "Unable to allocate 3.2 GiB"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "Cannot allocate memory"),
        (wrapped(torch.OutOfMemoryError(CUDA)), "Tried to allocate 2.00 GiB"),
        (RuntimeError("shapes do not match"), ""),
        (ValueError("the text is out of memory"), ""),
        (OSError(errno.ENOSPC, "No space left"), ""),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, Exception) else "",
)
def test_errors_for_lack_of_memory_are_recognized(error: Exception, reason: str):
    assert reason in out_of_memory_reason(error)
    assert bool(out_of_memory_reason(error)) == bool(reason)


def allocating(step: int, in_validation: bool = False) -> list[str]:
    target = f"{{_target_:{__name__}.Allocate,step:{step},in_validation:{str(in_validation).lower()}}}"
    return [f"+callbacks.allocate={target}", "allow_targets=[tests]"]


@pytest.mark.parametrize("in_validation", [False, True], ids=["training", "validation"])
def test_out_of_memory_names_micro_batch(in_validation: bool, train_here: Train, tiny: list[str]):
    """Before the first step no run directory is left; later the message continues the run with half the micro-batch."""
    keys = [*tiny, "steps=6", "micro_batch=4", "checkpoint_every=2", "validate_every=4", "run_dir=run"]
    if not in_validation:
        answer = train_here(*keys, *allocating(0))
        assert answer.code == 2, answer.stderr
        assert "micro_batch=4: can't allocate memory: you tried to allocate 1125899906842624 bytes." in answer.stderr
        assert "result up to rounding: micro_batch=2\n" in answer.stderr
        assert not Path("run").exists()
    answer = train_here(*keys, *allocating(4, in_validation))
    assert answer.code == 2
    assert "Traceback" not in answer.stderr
    assert "result up to rounding: python train.py resume=run micro_batch=2\n" in answer.stderr
    assert read_report(Path("run"))["status"] == "failed"


def test_out_of_memory_with_single_sequences_names_other_keys(train_here: Train, tiny: list[str]):
    answer = train_here(*tiny, "steps=2", "micro_batch=1", *allocating(0))
    assert answer.code == 2
    assert "It is 1 already. Try activation_checkpointing=true" in answer.stderr


def test_a_given_micro_batch_limits_validation_too(train_here: Train, tiny: list[str], monkeypatch: pytest.MonkeyPatch):
    from datamodules import micro_batches

    seen = []
    original = micro_batches.SequentialBatches.__getitem__

    def record(self: Any, number: int) -> Any:
        batch = original(self, number)
        seen.append(len(batch.input_ids))
        return batch

    monkeypatch.setattr(micro_batches.SequentialBatches, "__getitem__", record)
    assert train_here(*tiny, "steps=1", "micro_batch=2", "run_dir=run").code == 0
    assert max(seen) == 2
