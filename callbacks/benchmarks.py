"""Benchmarks: zero-shot tasks of lm-evaluation-harness (HellaSwag, LAMBADA, …) on the model during training."""

import copy
import logging
import time
from typing import Any

import lightning
import torch
from lightning import Trainer

from callbacks.ending import run_status
from callbacks.interrupt import Interrupt
from callbacks.progress_marks import ProgressMarks
from callbacks.throughput import BENCHMARK, outside_training_time
from gpt2lab.data.batch import Batch
from gpt2lab.errors import InputError
from gpt2lab.evaluation.lm_eval_harness import TaskSet, find_tasks, run_tasks
from gpt2lab.generation.sampling import generation_mode
from gpt2lab.metric_names import BENCHMARK_PREFIX, STANDARD_ERROR
from gpt2lab.storage.report_json import FINISHED
from gpt2lab.system.stop_request import REASONS, Interrupted, is_urgent

log = logging.getLogger(__name__)

KEY = "callbacks.benchmarks"
Scores = dict[str, tuple[float, float | None]]


class Benchmarks(lightning.Callback):
    """Log `benchmarks/TASK/METRIC` and its standard error every `every` steps and after the last one.

    The first rank runs the tasks; the others wait in short collective calls, so neither a time limit nor a signal is
    missed. Training is the same with and without it: modes and random states are restored. An error within the tasks is
    a warning.

    Args:
        tasks: names of tasks or groups.
        limit: maximum number of examples per task; 0: all.
        path: folder with further task files; empty: none.
        batch_size: examples per forward pass.
    """

    def __init__(self, every: int, tasks: list[str], limit: int, path: str = "", batch_size: int = 16) -> None:
        self.every = every
        self.tasks = list(tasks)
        self.path = path
        self.limit = limit
        self.batch_size = batch_size
        self._loaded: TaskSet | None = None  # on the first rank
        self._due_step = -1  # step whose tasks were interrupted, which the resumed run repeats
        self._measured_step = -1
        self._reason = ""  # signal that a rank has received

    def state_dict(self) -> dict[str, Any]:
        return {"due_step": self._due_step, "measured_step": self._measured_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._due_step, self._measured_step = state_dict["due_step"], state_dict["measured_step"]

    def setup(self, trainer: Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Load the data of the tasks, before the first step."""
        error = ""
        if trainer.is_global_zero:
            try:
                self._loaded = find_tasks(",".join(self.tasks), self.path, f"{KEY}.tasks", f"{KEY}.path")
            except InputError as reason:
                error = str(reason)
        error = trainer.strategy.broadcast(error)
        if error:
            raise InputError(error)

    def on_train_start(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        if self._due_step == trainer.global_step:
            self._run(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step % self.every == 0 or step == trainer.max_steps
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and due:
            self._run(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        """Run the tasks after an unscheduled end, such as early stopping."""
        if run_status(trainer) in FINISHED and self._measured_step != trainer.global_step:
            self._run(trainer, pl_module)

    def _run(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        started = time.monotonic()
        with outside_training_time(trainer, BENCHMARK):
            scores, failure, reason = self._scores(trainer, pl_module)
        step = trainer.global_step
        if is_urgent(reason):
            self._due_step = step
            for callback in trainer.callbacks:
                if isinstance(callback, Interrupt):
                    callback.stop_after_step(trainer, pl_module, reason)
            return
        self._due_step, self._measured_step = -1, step
        if failure:
            log.warning("The benchmarks of step %d failed, and training continues: %s", step, failure)
            return
        errors = {name + STANDARD_ERROR: error for name, (_, error) in scores.items() if error is not None}
        metrics = {name: value for name, (value, _) in scores.items()} | errors
        pl_module.log_measured("benchmarks", step, {f"{BENCHMARK_PREFIX}{name}": metrics[name] for name in metrics})
        written = " · ".join(
            f"{name} {value:.4g}{'' if error is None else f' ± {error:.2g}'}" for name, (value, error) in scores.items()
        )
        log.info("step %d · %s · %.0f s", step, written, time.monotonic() - started)

    def _scores(self, trainer: Trainer, pl_module: lightning.LightningModule) -> tuple[Scores, str, str]:
        """Return the scores, or the text of an error, or the signal that ended them, on every rank; collective."""
        with pl_module.averaged_weights():
            model = pl_module.generation_model()  # gathered on every rank where weights are sharded
            outcome: tuple[Scores, str, str] | None = None
            if trainer.is_global_zero:
                outcome = self._scores_of(model, trainer, pl_module)
            while (done := self._exchange(trainer, pl_module, outcome)) is None:
                pass
        return done

    def _scores_of(self, model: Any, trainer: Trainer, pl_module: lightning.LightningModule) -> tuple[Scores, str, str]:
        """Run the tasks on the first rank."""
        assert self._loaded is not None
        eager = torch.compiler.set_stance("force_eager")  # compiled blocks would be recompiled for every length
        try:
            with generation_mode(model, seed=0), trainer.precision_plugin.val_step_context(), torch.no_grad(), eager:
                scores = run_tasks(
                    model,
                    copy.deepcopy(pl_module.tokenizer),
                    self._loaded,
                    self.limit,
                    self.batch_size,
                    lambda: self._check(trainer, pl_module),
                )
        except Interrupted as interrupted:
            return {}, "", str(interrupted)
        except Exception as error:
            return {}, f"{type(error).__name__}: {error}".partition("\n")[0][:200], ""
        return scores, "", ""

    def _check(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        """End the tasks if a rank received a signal.

        Raises:
            Interrupted: with the name of the signal.
        """
        self._exchange(trainer, pl_module, None)
        if is_urgent(self._reason):
            raise Interrupted(self._reason)

    def _exchange(
        self, trainer: Trainer, pl_module: lightning.LightningModule, outcome: tuple[Scores, str, str] | None
    ) -> tuple[Scores, str, str] | None:
        """Exchange signals and the outcome between the ranks; return the first rank's outcome, None until it is known.

        The first rank calls it before each forward pass, the others call it until they receive the outcome.
        """
        for callback in trainer.callbacks:
            if isinstance(callback, ProgressMarks):
                callback.heartbeat.mark(f"in the benchmarks after step {trainer.global_step}")
        received = pl_module.from_ranks((pl_module.stop_request.reason, outcome))
        self._reason = max((reason for reason, _ in received), key=REASONS.index)
        return received[0][1]
