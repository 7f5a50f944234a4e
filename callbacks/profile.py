"""Profile: record what PyTorch does in some steps of the training, for `profile=START:COUNT`.

profile/trace-rank0.json.gz         every operation and GPU kernel, for https://ui.perfetto.dev or chrome://tracing
profile/operations-rank0.txt        the operations with the most time, and those that allocate the most memory
profile/memory-rank0.pickle         on a GPU: the last 200,000 allocations and frees, for https://pytorch.org/memory_viz;
                                    where a profiled step fails, as without enough memory, this file alone
"""

import contextlib
import logging
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning import Trainer
from torch.profiler import ProfilerActivity

from gpt2lab.data.batch import Batch
from gpt2lab.settings import profiled_steps
from gpt2lab.storage.atomic_files import input_error_when_full

log = logging.getLogger(__name__)

FOLDER = "profile"
MOST_ALLOCATIONS = 200_000  # of the memory snapshot
ROWS = 30  # operations of each table


class Profile(lightning.Callback):
    """Profile some steps, from their first micro-batch to the end of the last; second callback, after Throughput.

    A run that is resumed among these steps profiles those that are left.

    Args:
        steps: "START:COUNT" as in `profiled_steps`; None: no step.
    """

    def __init__(self, steps: str | None) -> None:
        self.steps = profiled_steps(steps) if steps is not None else range(0)
        self.profiler: torch.profiler.profile | None = None

    def on_train_start(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        done, last = trainer.global_step, self.steps.stop - 1
        if self.steps and done >= last:
            log.warning("Nothing is profiled: step %d is done, and the last one to profile is %d.", done, last)
        self.steps = range(max(self.steps.start, done + 1), self.steps.stop)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: lightning.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        is_first = batch_idx % trainer.accumulate_grad_batches == 0
        if self.steps and is_first and trainer.global_step + 1 == self.steps.start:
            self._start(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        is_last = trainer.global_step >= self.steps.stop - 1
        if is_last and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._finish(trainer, pl_module.device)

    def on_train_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        self._finish(trainer, pl_module.device)

    def on_exception(self, trainer: Trainer, pl_module: lightning.LightningModule, exception: BaseException) -> None:
        if self.profiler is None:
            return
        profiler, self.profiler = self.profiler, None
        # An exception here, as of a full disk, would hide the one that ends the run.
        with contextlib.suppress(Exception):
            profiler.stop()
        with contextlib.suppress(Exception):
            _write_memory(_folder(trainer), trainer.global_rank, pl_module.device)

    def _start(self, device: torch.device) -> None:
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        profiler = torch.profiler.profile(
            activities=activities, record_shapes=True, profile_memory=True, acc_events=True
        )
        profiler.start()
        if device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=MOST_ALLOCATIONS)
        self.profiler = profiler

    def _finish(self, trainer: Trainer, device: torch.device) -> None:
        """Write the files, if steps have been recorded."""
        if self.profiler is None:
            return
        profiler, self.profiler = self.profiler, None
        profiler.stop()
        folder, rank = _folder(trainer), trainer.global_rank
        with input_error_when_full(f"the profile {folder}", "Free some space, or leave out profile."):
            folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(folder / f"trace-rank{rank}.json.gz"))
            (folder / f"operations-rank{rank}.txt").write_text(_tables(profiler, device))
            _write_memory(folder, rank, device)
        log.info("profile of steps %d to %d: %s", self.steps.start, trainer.global_step, folder)


def _folder(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / FOLDER


def _write_memory(folder: Path, rank: int, device: torch.device) -> None:
    """Write the allocations recorded on a GPU, and record no more."""
    if device.type == "cuda":
        folder.mkdir(exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(folder / f"memory-rank{rank}.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)


def _tables(profiler: torch.profiler.profile, device: torch.device) -> str:
    """Return two tables of operations: by time, and by the memory that they allocate."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    averages = profiler.key_averages()
    by_time = averages.table(sort_by=f"self_{kind}_time_total", row_limit=ROWS, max_name_column_width=60)
    by_memory = averages.table(sort_by=f"self_{kind}_memory_usage", row_limit=ROWS, max_name_column_width=60)
    return f"By time\n{by_time}\nBy allocated memory\n{by_memory}\n"
