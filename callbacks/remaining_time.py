"""Remaining time of a run: its steps, validations, samples, benchmarks, checkpoints, exports and final score."""

import math

from lightning import Callback, Trainer
from lightning.pytorch.callbacks import Timer

from callbacks.benchmarks import Benchmarks
from callbacks.checkpoint import Checkpoint
from callbacks.final_score import FinalScore
from callbacks.samples import Samples
from callbacks.throughput import BENCHMARK, EXPORT, SAMPLE, SAVE, TRAIN, VALIDATE, find_throughput
from gpt2lab.system.run_time import count_events


def remaining_seconds(trainer: Trainer, first_step: int, elapsed: float, trained: float = 0.0) -> float:
    """Estimate the seconds until the run has ended, from the measured phases.

    A validation that is not measured yet is estimated from the speed of training; samples, benchmarks and checkpoints
    that are not measured yet are left out. With trainer.max_time it is at most the time that is left, with the work
    after the stop.

    Args:
        first_step: step after which steps are measured; at least one has followed.
        elapsed: seconds since then, which are all that is known without the callback Throughput.
        trained: seconds of training in this process up to `first_step`, by that callback.
    """
    step, last, clock = trainer.global_step, trainer.max_steps, find_throughput(trainer)
    limit = min((left for left in map(_time_left, trainer.callbacks) if left is not None), default=math.inf)
    if clock is None:
        return min(elapsed / (step - first_step) * (last - step), limit)
    per_step = (clock.seconds_so_far(TRAIN) - trained) / (step - first_step)
    per_validation = clock.mean(VALIDATE) or per_step * _steps_of_a_validation(trainer)
    validations = count_events(step, last, max(int(trainer.val_check_batch) // trainer.accumulate_grad_batches, 1))
    score = _validations_of_the_score(trainer)
    seconds = per_step * (last - step) + per_validation * (validations + score)
    limit += per_validation * (1 + score)
    for callback in trainer.callbacks:
        if isinstance(callback, Samples):
            seconds += (clock.mean(SAMPLE) or 0.0) * count_events(step, last, callback.every)
        if isinstance(callback, Benchmarks):
            seconds += (clock.mean(BENCHMARK) or 0.0) * count_events(step, last, callback.every)
        if isinstance(callback, Checkpoint):
            per_save = (clock.mean(SAVE) or 0.0) + (clock.mean(EXPORT) or 0.0)
            seconds += per_save * count_events(step, last, callback.every)
            limit += per_save
    return min(seconds, limit)


def _time_left(callback: Callback) -> float | None:
    """Return the seconds until a time limit stops the run; None if the callback is none."""
    return callback.time_remaining() if isinstance(callback, Timer) else None


def _steps_of_a_validation(trainer: Trainer) -> float:
    """Return the cost of a validation in training steps."""
    share = trainer.lightning_module.forward_share()
    return share * len(trainer.datamodule.val_rows) / trainer.datamodule.batch_sequences


def _validations_of_the_score(trainer: Trainer) -> float:
    """Return the cost of the final score in validations; 0 where a validation reads all that it would."""
    validated = len(trainer.datamodule.val_rows)
    scored = [len(callback.rows(trainer)) for callback in trainer.callbacks if isinstance(callback, FinalScore)]
    return sum(rows / validated for rows in scored if rows > validated)
