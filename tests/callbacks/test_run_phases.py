"""A run's time is divided into phases, from which the progress bar estimates what is left of all of them."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
from lightning.pytorch.callbacks import Timer

from callbacks.progress import ProgressBar
from callbacks.remaining_time import remaining_seconds
from callbacks.samples import Samples
from gpt2lab.reports.report_html import RunFiles, render
from gpt2lab.storage.report_json import read_report
from gpt2lab.system.run_time import count_events, forward_share
from gpt2lab.system.terminal import Phase, format_time
from tests.conftest import Train
from tests.support import tiny_run
from tests.support.pages import charts_of

STEPS, BATCH, SAMPLE, SAVE = 16, 1_000, 1_000_000_000, 1_000_000  # seconds; a micro-batch takes one


class Clock(lightning.Callback):
    """Moves the clock by what a run does, and estimates before each step what is left."""

    def __init__(self) -> None:
        self.now = 0.0
        self.batches = 0  # of all validations
        self.estimates: dict[int, tuple[float, float]] = {}  # step → (time, estimate of the rest)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step and batch_idx % trainer.accumulate_grad_batches == 0:
            self.estimates[step] = (self.now, remaining_seconds(trainer, 0, elapsed=0.0))
        self.now += 1

    def on_validation_batch_start(self, *_unused: Any) -> None:
        self.batches += 1
        self.now += BATCH

    def on_save_checkpoint(self, *_unused: Any) -> None:
        self.now += SAVE


class TimedSamples(Samples):
    """Samples that take SAMPLE seconds."""

    clock: Clock

    def _sample(self, trainer: Any, pl_module: Any) -> None:
        self.clock.now += SAMPLE


def test_phases_and_remaining_time_count_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, samples = Clock(), TimedSamples(every=4, prompts=[], max_new_tokens=2)
    samples.clock = clock
    monkeypatch.setattr("callbacks.throughput.time", SimpleNamespace(perf_counter=lambda: clock.now))
    tiny_run.train(tmp_path / "run", tmp_path / "cache", steps=STEPS, extra=[clock, samples])
    phases = read_report(tmp_path / "run")["seconds_by_phase"]
    training = STEPS * tiny_run.ACCUMULATE
    assert phases == {
        "prepare": 0,
        "train": training,
        "validate": clock.batches * BATCH,
        "sample": 4 * SAMPLE,
        "benchmark": 0,
        "save": 4 * SAVE,
        "export": 0,
    }
    measured = range(8, STEPS)  # once each phase was measured
    rests = {step: clock.now - at for step, (at, _) in clock.estimates.items()}
    assert {step: clock.estimates[step][1] for step in measured} == {step: rests[step] for step in measured}
    before = clock.estimates[3][1]
    assert before > (STEPS - 3) * tiny_run.ACCUMULATE, "a validation that is not measured yet is estimated"


class Estimates(ProgressBar):
    """Records the estimate before each step."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.found: dict[int, tuple[float, float | None]] = {}  # step → (time, estimate of the rest)

    def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
        super().on_train_batch_start(trainer, *rest)
        if trainer.global_step > 8 and trainer.global_step not in self.found:
            self.found[trainer.global_step] = (self.clock.now, self._remaining(trainer))


class SlowStart(Clock):
    """Takes 1,000 seconds more for the first step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.now += 1_000 * (trainer.global_step == 0)


def test_eta_leaves_out_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SlowStart()
    bar = Estimates(clock)
    monkeypatch.setattr("callbacks.throughput.time", SimpleNamespace(perf_counter=lambda: clock.now))
    tiny_run.train(tmp_path / "run", tmp_path / "cache", steps=STEPS, extra=[bar, clock])
    assert {step: rest for step, (_, rest) in bar.found.items()} == {
        step: clock.now - at for step, (at, _) in bar.found.items()
    }


@pytest.mark.parametrize(
    ("first", "last", "every", "count"),
    [(0, 300, 100, 3), (0, 250, 100, 3), (200, 250, 100, 1), (100, 200, 100, 1), (99, 100, 100, 1), (100, 100, 100, 0)],
)
def test_events_are_every_so_many_steps_and_after_the_last(first: int, last: int, every: int, count: int) -> None:
    assert count_events(first, last, every) == count


def test_forward_passes_are_a_third_of_a_step_without_a_teacher() -> None:
    assert forward_share(5.0) == pytest.approx(1 / 3)
    assert forward_share(1.0, teacher=3.0) == pytest.approx(4 / 6)


def test_report_adds_the_phases_of_a_resumed_run(
    train_here: Train, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = itertools.count()  # each reading of the clock is a second later
    clock = SimpleNamespace(perf_counter=lambda: next(seconds), monotonic=lambda: next(seconds))
    monkeypatch.setattr("callbacks.throughput.time", clock)
    monkeypatch.setattr("launch.run.prepare.time", clock)

    def phases(*words: str) -> dict[str, float]:
        assert train_here(*words).code == 0
        return dict(read_report("run")["seconds_by_phase"])

    words = ("callbacks=default", "callbacks.progress=null", "callbacks.checkpoint.verify_export=false")
    first = phases(*tiny, *words, "callbacks.samples.max_new_tokens=2", "steps=2", "threads=1", "run_dir=run")
    assert list(first) == ["prepare", "train", "validate", "sample", "benchmark", "save", "export"]
    assert [name for name, seconds in first.items() if not seconds] == ["benchmark", "export"]
    pages: list[str] = []
    monkeypatch.setattr("callbacks.report.PAGE_SECONDS", -1e9)  # between two pages of a run that trains
    monkeypatch.setattr(
        "callbacks.report.write_page",
        lambda run, report, patience: pages.append(render("run", report, RunFiles(patience=patience))),
    )
    longer = phases("resume=run", "steps=4", "validate_every=1")
    assert all(longer[name] > first[name] for name in ("prepare", "train", "validate", "sample"))
    assert read_report("run")["events"] == [[2, "resumed"]]
    assert pages
    assert all("running · pretrain" in page and 'http-equiv="refresh"' in page for page in pages)
    finished = Path("run/report.html").read_text()
    assert 'http-equiv="refresh"' not in finished
    assert charts_of(finished)[0]["events"] == [[2, "resumed"]]


def test_page_is_written_before_the_first_step(tmp_path: Path) -> None:
    pages: list[str] = []

    class Reader(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            pages.append((Path(trainer.default_root_dir) / "report.html").read_text())

    tiny_run.train(tmp_path / "run", tmp_path / "cache", steps=2, extra=[Reader()])
    assert "running · " in pages[0]
    assert "step 0" in pages[0]
    assert "No loss is logged yet." in pages[0]
    assert 'data-patience="600"' in pages[0]


class Steps(ProgressBar):
    """Records the estimate after every step."""

    def __init__(self, trainer: Any) -> None:
        super().__init__()
        self.estimates: list[str] = []
        self.on_train_start(trainer, trainer)
        for step in range(trainer.global_step + 1, trainer.max_steps + 1):
            trainer.global_step = step
            self._training = Phase("train")
            self._show(trainer)
            self.estimates.append(self._left(trainer))


@pytest.mark.parametrize(("first", "last", "unknown"), [(0, 8, 3), (20, 28, 3), (0, 2, 1), (0, 1, 0)])
def test_eta_waits_for_three_measured_steps(first: int, last: int, unknown: int) -> None:
    trainer: Any = SimpleNamespace(
        global_step=first, max_steps=last, callbacks=[], callback_metrics={}, log_every_n_steps=1, is_global_zero=True
    )
    estimates = Steps(trainer).estimates
    assert estimates[:unknown] == [""] * unknown
    assert all(estimates[unknown:])


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.7, "1:00"), (3599.5, "1:00:00"), (61.2, "1:01")])
def test_seconds_of_the_eta_are_below_sixty(seconds: float, text: str) -> None:
    assert format_time(seconds) == text


def test_eta_ends_with_the_time_limit() -> None:
    trainer: Any = SimpleNamespace(global_step=10, max_steps=1000, callbacks=[Timer("00:00:01:00")])
    assert remaining_seconds(trainer, 0, elapsed=1.0) == 60
    assert remaining_seconds(trainer, 0, elapsed=0.1) == pytest.approx(9.9)
