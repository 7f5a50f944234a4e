"""Page of the demo: demo.html in its folder, rewritten while the stages run."""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from gpt2lab.analysis.sweep_runs import group_runs
from gpt2lab.reports.demo_html import DemoContent, render
from gpt2lab.storage.atomic_files import write_text
from gpt2lab.storage.metrics_csv import read_metrics
from launch.commands import demo_results
from launch.commands.compare import as_sweep_run
from launch.commands.demo_stages import FINETUNED, TRAINED, Stage, best_student
from launch.config.run_dir import CONFIG

FILE = "demo.html"
PAGE_SECONDS = 10.0  # between two versions, which may take at most 2 % of the time


class DemoPage:
    """Writer of the page.

    Args:
        home: folder that `folder` is relative to.
        folder: of the demo.
    """

    def __init__(self, home: Path, folder: Path, stages: Sequence[Stage]) -> None:
        self.whole, self._folder = home / folder, folder
        self._names = [stage.name for stage in stages]
        self._due = 0.0

    @property
    def address(self) -> str:
        """URL of the page, which a browser on this machine opens."""
        return (self.whole / FILE).absolute().as_uri()

    def update(self, running: str) -> None:
        """Rewrite the page if it is due, during the stage `running`."""
        if time.monotonic() >= self._due:
            with suppress(OSError):  # a full disk ends the stage, where it loses something
                self.write(running)

    def write(self, running: str = "", ended: str = "") -> None:
        """Write the page now.

        Args:
            running: stage that is running.
            ended: why no stage will follow; empty while some will.
        """
        begin = time.monotonic()
        status = ended or f"{running or 'The first stage'} is running · this page reloads itself"
        write_text(self.whole / FILE, render(f"Demo in {self._folder}", status, self._content(running, bool(ended))))
        end = time.monotonic()
        self._due = end + max(PAGE_SECONDS, 50 * (end - begin))

    def _content(self, running: str, is_over: bool) -> DemoContent:
        begun = [name for name in self._names if (self.whole / name / CONFIG).is_file()]
        runs = [
            as_sweep_run(number, self.whole / name, _described(name), {"stage": name}, self.whole / FILE)
            for number, name in enumerate(begun)
        ]
        answers = demo_results.summary_scores(self.whole)
        states = {run.overrides["stage"]: run.status for run in runs} | ({running: "running"} if running else {})
        rows = demo_results.results_rows(self.whole, TRAINED)
        return DemoContent(
            stages=[{"stage": row["stage"], "state": states.get(row["stage"], "waiting"), **row} for row in rows],
            links={run.overrides["stage"]: run.page for run in runs if run.page},
            notes=[*demo_results.comparison(self.whole), demo_results.SPLIT_NOTE],
            scores=demo_results.score_rows(answers) if answers else [],
            results=group_runs(runs, []),
            rows=[read_metrics(self.whole / name) for name in begun],
            samples=demo_results.sample_columns(self.whole),
            commands=demo_results.next_commands(self._folder, best_student(self.whole)) if is_over else {},
            is_over=is_over,
        )


def _described(name: str) -> str:
    return f"{name} (summaries only)" if name == FINETUNED else name
