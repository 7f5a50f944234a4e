"""Clock of the demo: estimates its remaining time after ten steps of the first stage, and again after each stage.

Rule: every part of the demo has a usual time. After ten steps, each part is taken to need as many times its usual time
as these steps did; after a stage, as many times as the stages so far did.
"""

import math
import time
from collections.abc import Sequence

from launch.commands.demo_stages import Stage

STEPS = 10  # of the first stage that runs, before the first estimate


class Clock:
    """Time of the stages that are not finished yet, as multiples of their usual times.

    Args:
        stages: those to run, in order.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = list(stages)
        self._begin = time.monotonic()
        self._usual = self._measured = 0.0  # seconds of the stages that have ended

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._begin

    def first_estimate(self, stage: Stage, seconds_per_step: float) -> str:
        """Return one line with the estimated total time, from the measured steps of the first stage."""
        total = self.seconds + remaining_seconds(stage, self._stages, seconds_per_step / stage.step_seconds)
        return (
            f"Estimate: about {in_minutes(total)} in total: after {STEPS} steps, one took {seconds_per_step:.2f} s, "
            f"on an idle machine of two cores {stage.step_seconds:.2f} s."
        )

    def end_stage(self, stage: Stage, seconds: float, is_whole: bool) -> str:
        """Return one line with the estimated remaining time; empty after the last stage, or while it is unknown.

        Args:
            is_whole: whether the stage began in these seconds, and was not resumed.
        """
        if is_whole:
            self._usual, self._measured = self._usual + stage.seconds, self._measured + seconds
        later = _later(stage, self._stages)
        if not later or not self._usual:
            return ""
        left = sum(one.seconds for one in later) * self._measured / self._usual
        return f"{stage.name} took {seconds:.0f} s. About {in_minutes(left)} left."


def remaining_seconds(stage: Stage, stages: Sequence[Stage], slower: float) -> float:
    """Return the seconds left after STEPS steps of `stage`, each part `slower` times its usual time."""
    later = sum(one.seconds for one in _later(stage, stages))
    return slower * (stage.step_seconds * (stage.steps - STEPS) + later)


def _later(stage: Stage, stages: Sequence[Stage]) -> Sequence[Stage]:
    return stages[[one.name for one in stages].index(stage.name) + 1 :]


def in_minutes(seconds: float) -> str:
    """Format as `50 s`, or as minutes to the next half: `4½ min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    halves = math.ceil(seconds / 30)
    return f"{halves // 2}{'½' * (halves % 2)} min"
