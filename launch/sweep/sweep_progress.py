"""Sweep progress: position and setting of each job of a sweep, best result so far, and remaining time."""

import math
import time
from collections.abc import Callable, Sequence

from gpt2lab import metric_names
from gpt2lab.number_format import column_decimals, fixed
from gpt2lab.storage.report_json import read_report
from gpt2lab.system.terminal import Phase, console, format_time, is_live, show, terminal_width
from launch.config.unused_keys import given_keys
from launch.sweep.jobs import Job
from launch.sweep.results import short_overrides
from launch.sweep.text_table import wrapped

ENDED = ("finished", "pruned", "failed", "stopped")


class SweepProgress:
    """Lines for the start and the end of each job, and a bar if jobs print to files.

    Args:
        total: jobs of the sweep, of a search at most.
        keys: keys in which the jobs differ.
        slots: jobs that run at once at most.
        has_bar: whether this process alone prints to the terminal.
    """

    def __init__(self, total: int, keys: Sequence[str], slots: int, *, has_bar: bool) -> None:
        self.total, self.keys, self.slots, self.has_bar = total, list(keys), max(slots, 1), has_bar
        self.bar = Phase("sweep", total, "jobs", prints_lines=False, has_rate=False)
        self._jobs: list[Job] = []
        self._begun: dict[int, float] = {}  # job number → time of its start
        self._durations: list[float] = []

    def create(self, job: Job) -> None:
        """Print a job that is about to start."""
        self._jobs.append(job)
        state = [] if self.has_bar and is_live(console().file) else self._state()
        show(wrapped("  ".join([f"{self.name(job)}  (folder {job.folder.name})", *state]), terminal_width()))

    def change(self, job: Job) -> None:
        """Record the start or the end of a job."""
        now = time.monotonic()
        if job.status == "running":
            self._begun[job.number] = now
        elif job.number in self._begun:
            self._durations.append(now - self._begun.pop(job.number))
        self.bar.done = sum(other.status in ENDED for other in self._jobs)
        self.bar.numbers, self.bar.remaining = self._best(), self._left()
        self.bar.refresh(at_once=True)

    def wait(self) -> None:
        """Show the time that has passed."""
        self.bar.remaining = self._left()
        self.bar.refresh()

    def name(self, job: Job) -> str:
        """Return position and setting of a job: job 3/6 loss=jsd."""
        position = self._jobs.index(job) + 1
        own = [word for word in job.overrides if given_keys([word])[0] in self.keys]
        return f"job {position}/{max(self.total, position)} {short_overrides(own)}".rstrip()

    def result(self, job: Job) -> str:
        """Return the watched metric and the seconds of a job that has ended."""
        report = read_report(job.folder)
        metric = report.get("watched_metric", "")
        value = "" if job.watched is None else f"{metric} {_shown(metric, job.watched, self._jobs)}, "
        return f"{value}{report.get('seconds', 0):.0f} s"

    def _state(self) -> list[str]:
        """Return the best result and the remaining time, as far as they are known."""
        left = self._left()
        return [*self._best(), *([] if left is None else [f"ETA {format_time(left)}"])]

    def _best(self) -> list[str]:
        return best_so_far(self._jobs, self.name)

    def _left(self) -> float | None:
        """Estimate the seconds until all jobs have ended, from those that this process has run.

        None before one has ended, and while all that is left are jobs that run longer than those did.
        """
        if not self._durations:
            return None
        left = self.total - sum(job.status in ENDED for job in self._jobs)
        mean = sum(self._durations) / len(self._durations)
        running = sum(max(mean - (time.monotonic() - begun), 0.0) for begun in self._begun.values())
        seconds = max(left - len(self._begun), 0) * mean + running
        return None if self._begun and not seconds else seconds / max(min(self.slots, left), 1)


def best_so_far(jobs: Sequence[Job], name: Callable[[Job], str]) -> list[str]:
    """Return the best result and the name of its job; jobs with different metrics are not compared."""
    ended = [job for job in jobs if job.watched is not None and math.isfinite(job.watched)]
    found = [(job, read_report(job.folder).get("watched_metric", "")) for job in ended]
    if len(metrics := {metric for _, metric in found}) != 1:
        return []
    metric = metrics.pop()
    choose = min if metric_names.lower_is_better(metric) else max
    best = choose((job for job, _ in found), key=lambda job: job.watched or 0.0)
    return [f"best {metric} {_shown(metric, best.watched or 0.0, jobs)}", f"by {name(best)}"]


def _shown(metric: str, value: float, jobs: Sequence[Job]) -> str:
    """Format a value with the decimals that the results so far need."""
    known = [job.watched for job in jobs if job.watched is not None]
    return fixed(value, column_decimals(known, metric_names.lower_is_better(metric)))
