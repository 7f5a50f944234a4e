"""Learning-rate schedules as plain functions of the step."""

import math

from gpt2lab.settings import ScheduleSettings


def learning_rate_factor(step: int, steps: int, schedule: ScheduleSettings) -> float:
    """Multiple of the peak learning rate used by optimizer step number `step` (counted from 0) of `steps`.

    Warm-up rises linearly and reaches 1 at its last step. Then wsd stays at 1 and falls linearly over the last
    `decay_fraction` of the steps, cosine and linear fall from the end of the warm-up, constant stays at 1; all but
    constant end at `final_fraction`.

    Source: wsd is the warm-up–stable–decay schedule of MiniCPM (arXiv 2404.06395).
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return 1.0
    decay_start = schedule.warmup_steps
    if schedule.name == "wsd":
        decay_start = max(decay_start, steps - round(steps * schedule.decay_fraction))
    last_step = max(steps - 1, decay_start + 1)
    progress = min(max((step - decay_start) / (last_step - decay_start), 0.0), 1.0)
    remaining = (1 + math.cos(math.pi * progress)) / 2 if schedule.name == "cosine" else 1 - progress
    return schedule.final_fraction + (1 - schedule.final_fraction) * remaining
