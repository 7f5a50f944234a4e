"""Progress of a sweep on the terminal: position and setting of a job, the best so far, remaining time."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.sweep.jobs import Job
from launch.sweep.sweep_progress import SweepProgress
from tests.conftest import Train

METRIC = '{"status": "finished", "watched_metric": "%s", "seconds": 12.0}'


def job(folder: Path, number: int, status: str, watched: float | None, metric: str = "val/loss") -> Job:
    made = Job(number, ["data=text", f"loss={'jsd' if number % 2 else 'tvd'}"], folder / str(number), status)
    made.watched = watched
    made.folder.mkdir()
    (made.folder / "report.json").write_text(METRIC % metric)
    return made


BEST: dict[str, tuple[list[tuple[str, float | None]], list[str]]] = {
    "lower loss": (
        [("val/loss", 4.0), ("val/loss", 3.5), ("val/loss", None)],
        ["best val/loss 3.50", "by job 2/3 loss=jsd"],
    ),
    "higher score": ([("val/rougeL", 4.0), ("val/rougeL", 3.5)], ["best val/rougeL 4.00", "by job 1/3 loss=tvd"]),
    "a score of zero": ([("val/rougeL", 0.0)], ["best val/rougeL 0.00", "by job 1/3 loss=tvd"]),
    "other metrics": ([("val/rougeL", 4.0), ("val/loss", 3.5)], []),
    "no result": ([("val/loss", None)], []),
    "no number": ([("val/loss", float("nan")), ("val/loss", 3.5)], ["best val/loss 3.50", "by job 2/3 loss=jsd"]),
}


@pytest.mark.parametrize("kind", BEST)
def test_best_so_far_is_by_the_metrics_own_order(kind: str, tmp_path: Path) -> None:
    jobs, expected = BEST[kind]
    progress = SweepProgress(3, ["loss"], 1, has_bar=False)
    for number, (metric, watched) in enumerate(jobs):
        progress.create(job(tmp_path, number, "finished", watched, metric))
    assert progress._best() == expected


def test_remaining_time_is_shared_by_the_jobs_at_once(tmp_path: Path) -> None:
    jobs = [job(tmp_path, number, "finished", 4.0) for number in range(2)]
    for slots, expected in ((1, 40.0), (2, 20.0), (8, 10.0)):
        progress = SweepProgress(6, ["loss"], slots, has_bar=False)
        assert progress._left() is None, "nothing is measured"
        progress._jobs, progress._durations = jobs, [8.0, 12.0]
        assert progress._left() == expected


RUNNING: dict[str, tuple[int, list[float], float | None]] = {  # jobs that wait, seconds of those that run → estimate
    "half done": (2, [5.0, 5.0], 15.0),
    "one overdue": (2, [5.0, 50.0], 12.5),
    "all overdue": (2, [50.0, 50.0], 10.0),
    "last, half done": (0, [5.0, 5.0], 5.0),
    "last, one overdue": (0, [5.0, 50.0], 2.5),
    "last, all overdue": (0, [50.0, 50.0], None),
}


@pytest.mark.parametrize("kind", RUNNING)
def test_overdue_jobs_do_not_shorten_the_estimate(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, seconds, expected = RUNNING[kind]
    monkeypatch.setattr("launch.sweep.sweep_progress.time", SimpleNamespace(monotonic=lambda: 100.0))
    progress = SweepProgress(3 + waiting, ["loss"], 2, has_bar=False)
    progress._jobs = [job(tmp_path, 0, "finished", 4.0)]
    progress._durations, progress._begun = [10.0], {n: 100.0 - passed for n, passed in enumerate(seconds, 1)}
    assert progress._left() == expected


def test_every_job_of_a_sweep_has_position_best_and_eta(
    jobs_here: None, train_here: Train, tiny: list[str], tmp_path: Path
) -> None:
    answer = train_here("-m", *tiny, "steps=2,3", "hydra.sweep.dir=sweep")
    assert answer.code == 0, answer.stderr
    lines = [line for line in answer.stdout.splitlines() if line.startswith("job ") and "/" in line]
    assert lines[0] == "job 1/2 steps=2  (folder 0)"
    form = r"job 2/2 steps=3  \(folder 1\)  best val/loss \d\.\d{2,4}  by job 1/2 steps=2  ETA \d+:\d\d"
    assert re.fullmatch(form, lines[1])
    assert "╭" not in answer.stdout
    assert "\x1b" not in answer.stdout + answer.stderr
