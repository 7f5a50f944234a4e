"""Demo: pretrains a teacher, distills it in two ways, compares with training from scratch and fine-tunes the result.

    make demo                  or    python -m launch.commands.demo
    make demo DATA=FOLDER            python -m launch.commands.demo path=FOLDER
    make demo-quick                  python -m launch.commands.demo quick=true

Each stage is a train.py or evaluate.py command, which is printed before it runs. All runs and their
page, demo.html, are in runs/demo. Stages that are finished there are not run again, an interrupted one is resumed.
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from gpt2lab.keys import key
from gpt2lab.metric_names import SECONDS
from gpt2lab.storage.metrics_csv import STEP, read_metrics
from launch.commands import demo_results
from launch.commands.demo_clock import STEPS, Clock, in_minutes
from launch.commands.demo_page import DemoPage
from launch.commands.demo_stages import (
    FULL,
    LOGGED_EVERY,
    QUICK,
    TRAINED,
    Sizes,
    Stage,
    best_student,
    choose_folder,
    demo_command,
    read_text,
    stages,
)
from launch.config.key_value_cli import describe, parse
from launch.config.run_dir import CONFIG
from launch.distributed import child_processes
from launch.distributed.child_processes import IS_CHECKOUT, ROOT
from launch.exit_codes import Exit, run_and_exit

HOME = ROOT if IS_CHECKOUT else Path.cwd()  # parent of the runs
POLL_SECONDS = 0.5
QUICK_NOTE = (
    "The models of demo-quick have trained for seconds: their losses and texts show only that each stage works."
)
ABOVE_BARS = "\n\n"  # end of a line that is printed while another process draws up to two bars


@dataclass(frozen=True)
class Arguments:
    """Arguments of the command."""

    path: str = key("your text in place of the standard library's source code: a file, folder or glob", "")
    quick: bool = key("the same stages with tiny models, in a minute", False)


def run_stage(stage: Stage, folder: Path, console: Console, watch: Callable[[], None]) -> int:
    """Run one command with its output on the terminal; return its exit code.

    Args:
        watch: called about twice a second meanwhile.
    """
    console.rule(f"[bold]{stage.title}")
    console.print("python " + shlex.join(stage.command), style="dim", markup=False, highlight=False, soft_wrap=True)
    environment = {"WANDB_RUN_GROUP": folder.name, **child_processes.environment()}
    process = subprocess.Popen([sys.executable, *stage.command], cwd=HOME, env=environment, start_new_session=True)
    with child_processes.forward_signals(lambda number: child_processes.send(number, [process.pid])):
        while True:
            try:
                return process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                watch()


def run_demo(folder: Path, sizes: Sizes, data: tuple[str, ...], console: Console) -> int:
    """Run the stages that are not finished and print the results; return the exit code of one that fails, else 0.

    Args:
        folder: parent of the run directories, relative to HOME.
        data: keys of the text.
    """
    whole, plan = HOME / folder, stages(folder, sizes, data)
    page = DemoPage(HOME, folder, plan)
    page.write()
    console.print(f"All runs on one page, updated while they train: {page.address}", highlight=False, soft_wrap=True)
    left = [stage.name for stage in plan if not stage.is_done(whole)]
    done = [stage.name for stage in plan if stage.name not in left]
    if done:
        console.print(f"Finished before and not run again: {', '.join(done)}. To train anew, remove {folder}.")
    clock = Clock([stage for stage in plan if stage.name in left])
    for name in left:
        stage = next(one for one in stages(folder, sizes, data, best_student(whole)) if one.name == name)
        code = _run_watched(stage, folder, console, page, clock, is_first=name == left[0])
        if code:
            _print_stop(stage, code, left[left.index(name) :], demo_command(sizes, data), console)
            page.write(ended=f"{name} ended with exit code {code}")
            return code
    page.write(ended="All stages are finished")
    print_results(folder, page, console)
    if sizes == QUICK:
        console.print(QUICK_NOTE, highlight=False)
    console.print(f"{in_minutes(clock.seconds)} in total.", highlight=False)
    return 0


def _run_watched(stage: Stage, folder: Path, console: Console, page: DemoPage, clock: Clock, is_first: bool) -> int:
    """Run one stage while its page is updated and the time left is estimated."""
    run = HOME / folder / stage.name
    is_whole, begin, printed = not (run / CONFIG).is_file(), time.monotonic(), False

    def watch() -> None:
        nonlocal printed
        page.update(stage.name)
        if is_first and is_whole and not printed and (seconds := _seconds_per_step(run)):
            printed = True
            # Above the bars of the stage, which are drawn again below: of two, the second one overwrites the empty line
            console.file.write("\r\033[2K" if console.is_terminal else "")
            console.print(clock.first_estimate(stage, seconds), style="bold", highlight=False, end=ABOVE_BARS)

    code = run_stage(stage, folder, console, watch)
    if not code and (line := clock.end_stage(stage, time.monotonic() - begin, is_whole)):
        console.print(line, style="bold", highlight=False)
    return code


def _seconds_per_step(run: Path) -> float | None:
    """Return the mean of steps 6 to 10 of a run, since the first ones compile; None before they are logged."""
    ends = {int(row[STEP]): float(row[SECONDS]) for row in read_metrics(run)}
    first, last = STEPS - LOGGED_EVERY, STEPS
    return (ends[last] - ends[first]) / LOGGED_EVERY if first in ends and last in ends else None


def _print_stop(stage: Stage, code: int, left: Sequence[str], again: str, console: Console) -> None:
    later = f"; {', '.join(left[1:])} did not start" if left[1:] else ""
    console.print(
        f"\nThe demo stopped: stage {stage.name} ended with exit code {code}{later}.\n"
        f"Continue with: {again}\nFinished stages are kept, and this one is resumed.",
        highlight=False,
        soft_wrap=True,
    )


def print_results(folder: Path, page: DemoPage, console: Console) -> None:
    """Print tables, samples and next commands of a finished demo."""
    whole = HOME / folder
    console.print()
    console.print(demo_results.results_table(demo_results.results_rows(whole, TRAINED), console.width))
    console.print("Loss, paired by document:")
    for line in [*demo_results.comparison(whole), demo_results.SPLIT_NOTE]:
        console.print(line, highlight=False)
    console.print()
    answers = demo_results.summary_scores(whole)
    if answers:
        demo_results.print_summary_scores(answers, console)
    demo_results.print_samples(whole, console)
    demo_results.print_examples(whole, console)
    console.rule("next")
    if IS_CHECKOUT and not os.environ.get("VIRTUAL_ENV"):
        console.print("Activate the environment first, once per shell\n  source .venv/bin/activate", highlight=False)
    for title, command in demo_results.next_commands(folder, best_student(whole)).items():
        console.print(f"{title}\n  {command}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Page of all runs\n  {page.address}", highlight=False, soft_wrap=True)


def main() -> None:
    """Run the demo.

    Raises:
        InputError: invalid arguments, or too little text.
    """
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        print(f"{__doc__}\n{describe(Arguments)}")
        return
    arguments, console = parse(words, Arguments), Console()
    sizes = QUICK if arguments.quick else FULL
    data: tuple[str, ...] = ("data=stdlib",)
    identity = ""
    if arguments.path:
        identity = read_text(arguments.path, sizes)
        data = ("data=text", f"path={Path(arguments.path).expanduser().absolute()}")
        console.print("Teacher and students train on your text; fine-tuning keeps the standard library's functions.")
    code = run_demo(choose_folder(HOME, sizes, data, identity), sizes, data, console)
    if code:
        raise Exit(code)


if __name__ == "__main__":
    run_and_exit(main)
