"""Learning-rate schedules as pure functions of the step."""

import math

from gpt2lab.settings import SCHEDULES, ScheduleSettings

DEFAULT_WARMUP = 20


def learning_rate_factor(step: int, steps: int, schedule: ScheduleSettings) -> float:
    """Multiple of the peak learning rate at optimizer step `step` (counted from 0) of `steps`.

    The warm-up rises linearly and reaches 1 at its last step. After it, wsd stays at 1 and decays linearly over the
    last `decay_fraction` of the steps; cosine and linear decay from the end of the warm-up; constant stays at 1. A
    decay of n steps begins with 1 and ends with `final_fraction` at the run's last step.

    Source: wsd is the warm-up–stable–decay schedule of MiniCPM (arXiv 2404.06395).
    """
    if schedule.name in SCHEDULES.added:
        return SCHEDULES.added[schedule.name](step, steps, schedule)
    warmup, decay = warmup_steps(steps, schedule), decay_steps(steps, schedule)
    if step < warmup:
        return (step + 1) / warmup
    after = step - (steps - decay)  # decay steps before this one
    if decay <= 0 or after < 0:
        return 1.0
    progress = min(after / (decay - 1), 1.0) if decay > 1 else 1.0
    remaining = (1 + math.cos(math.pi * progress)) / 2 if schedule.name == "cosine" else 1 - progress
    return schedule.final_fraction + (1 - schedule.final_fraction) * remaining


def warmup_steps(steps: int, schedule: ScheduleSettings) -> int:
    """Length of the warm-up in steps; by default 20, or half of a run of at most 20 steps."""
    if schedule.warmup_steps is not None:
        return schedule.warmup_steps
    return DEFAULT_WARMUP if steps > DEFAULT_WARMUP else steps // 2


def decay_steps(steps: int, schedule: ScheduleSettings) -> int:
    """Length of the decay in steps, at most those after the warm-up; at least 1 for wsd with decay_fraction > 0."""
    rest = steps - warmup_steps(steps, schedule)
    if schedule.name == "constant" or rest <= 0:
        return 0
    if schedule.name != "wsd":
        return rest
    return min(max(round(steps * schedule.decay_fraction), math.ceil(schedule.decay_fraction)), rest)
