"""Learning-rate schedules as plain functions of the step."""

import math

from gpt2lab.settings import ScheduleSettings

DEFAULT_WARMUP = 20


def learning_rate_factor(step: int, steps: int, schedule: ScheduleSettings) -> float:
    """Multiple of the peak learning rate used by optimizer step number `step` (counted from 0) of `steps`.

    Warm-up rises linearly and reaches 1 at its last step. Then wsd stays at 1 and falls linearly over the last
    `decay_fraction` of the steps, cosine and linear fall from the end of the warm-up, constant stays at 1. A decay of
    n steps begins with 1 and ends with `final_fraction` at the run's last step; one of a single step is that step.

    Source: wsd is the warm-up–stable–decay schedule of MiniCPM (arXiv 2404.06395).
    """
    warmup, decay = warmup_steps(steps, schedule), decay_steps(steps, schedule)
    if step < warmup:
        return (step + 1) / warmup
    after = step - (steps - decay)  # steps of the decay before this one
    if decay <= 0 or after < 0:
        return 1.0
    progress = min(after / (decay - 1), 1.0) if decay > 1 else 1.0
    remaining = (1 + math.cos(math.pi * progress)) / 2 if schedule.name == "cosine" else 1 - progress
    return schedule.final_fraction + (1 - schedule.final_fraction) * remaining


def warmup_steps(steps: int, schedule: ScheduleSettings) -> int:
    """Length of the warm-up; by default 20 steps, or half of a run that has no more than 20."""
    if schedule.warmup_steps is not None:
        return schedule.warmup_steps
    return DEFAULT_WARMUP if steps > DEFAULT_WARMUP else steps // 2


def decay_steps(steps: int, schedule: ScheduleSettings) -> int:
    """Length of the decay, at most what the warm-up leaves; a wsd that has a decay at all has at least one step."""
    rest = steps - warmup_steps(steps, schedule)
    if schedule.name == "constant" or rest <= 0:
        return 0
    if schedule.name != "wsd":
        return rest
    return min(max(round(steps * schedule.decay_fraction), math.ceil(schedule.decay_fraction)), rest)
