"""Demo: pretrains a teacher, distills it, compares with training from scratch and fine-tunes, all through train.py.

    make demo        or        python -m launch.commands.demo

Each stage is a train.py command, which is printed before it runs. All runs are in runs/demo-<time>.
"""

import json
import math
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from gpt2lab.errors import InputError
from gpt2lab.evaluation.document_losses import loss_difference, read_document_losses
from gpt2lab.storage.report_json import read_report
from launch.distributed import child_processes
from launch.distributed.child_processes import IS_CHECKOUT, ROOT
from launch.exit_codes import Exit, run_and_exit

HOME = ROOT if IS_CHECKOUT else Path.cwd()  # parent of the runs
TRAIN = ("train.py",) if IS_CHECKOUT else ("-m", "gpt2lab_scripts.train")

# Optimizer steps of each stage; the demo takes four minutes on two CPU cores with bf16 instructions
TEACHER_STEPS = 320
STUDENT_STEPS = 200
FINETUNE_STEPS = 120

PROMPT_COUNT = 3


@dataclass(frozen=True)
class Stage:
    """One command of the demo.

    Attributes:
        name: name of its run directory.
        title: heading on the terminal.
        arguments: arguments of train.py.
    """

    name: str
    title: str
    arguments: tuple[str, ...]


def stages(folder: Path) -> list[Stage]:
    """Return the four commands; the two students differ only in the teacher (same seed, weights, batches, schedule)."""
    student = ("model=nano", "data=stdlib", *_lengths(STUDENT_STEPS))
    teacher = folder / "teacher"
    return [
        Stage(
            "teacher",
            "Pretraining a teacher (micro) on the standard library's source code",
            ("task=pretrain", "model=micro", "data=stdlib", *_lengths(TEACHER_STEPS)),
        ),
        Stage("distilled", "Distilling it into a student (nano)", ("task=distill", *student, f"teacher={teacher}")),
        Stage(
            "scratch",
            "Training the same student without the teacher, on the same batches",
            ("task=pretrain", *student),
        ),
        Stage(
            "finetuned",
            "Fine-tuning the distilled student: function body to summary line",
            ("task=finetune", "data=summarize", f"init={folder / 'distilled'}", *_lengths(FINETUNE_STEPS)),
        ),
    ]


def _lengths(steps: int) -> tuple[str, ...]:
    return (f"steps={steps}", f"validate_every={steps // 2}", f"checkpoint_every={steps}", f"sample_every={steps}")


def run_stage(stage: Stage, folder: Path, console: Console) -> int:
    """Run one command with its output on the terminal; return its exit code."""
    command = [*TRAIN, *stage.arguments, f"run_dir={folder / stage.name}"]
    console.rule(f"[bold]{stage.title}")
    console.print("python " + shlex.join(command), style="dim", markup=False, highlight=False, soft_wrap=True)
    environment = {"WANDB_RUN_GROUP": folder.name, **child_processes.environment()}
    process = subprocess.Popen([sys.executable, *command], cwd=HOME, env=environment, start_new_session=True)
    with child_processes.forward_signals(lambda number: child_processes.send(number, [process.pid])):
        return process.wait()


def results_table(reports: dict[str, dict[str, Any]]) -> Table:
    """Return a table with one row per stage, from its report.json."""
    table = Table(title="Trained models", box=SIMPLE_HEAD, padding=0)  # fits into 80 columns
    for column in ("stage", "model", "loss", "± docs", "perplexity", "bits/byte", "ROUGE-L", "tokens/s", "seconds"):
        table.add_column(column, justify="left" if column in ("stage", "model") else "right")
    for name, report in reports.items():
        table.add_row(
            name,
            str(report["model"]),
            _number(report.get("val_loss"), ".3f"),
            _number(report.get("val_loss_error"), ".3f"),
            _number(report.get("val_perplexity"), ".1f"),
            _number(report.get("bits_per_byte"), ".3f"),
            _number(report["metrics"].get("val/rougeL"), ".3f"),
            _number(report.get("tokens_per_second"), ",.0f"),
            _number(report.get("seconds"), ".0f"),
        )
    return table


def comparison(folder: Path, reports: dict[str, dict[str, Any]]) -> str:
    """Format the difference in loss between the distilled student and the one from scratch, paired by document."""
    runs = ("distilled", "scratch")
    ours, theirs = (reports[run]["val_loss"] for run in runs)
    difference = loss_difference(*(read_document_losses(folder / run) for run in runs))
    found = f"{ours - theirs:+.3f} nats".replace("-", "−") if difference is None else str(difference)
    return (
        f"At equal tokens, loss of the distilled student minus that of the student from scratch: {found}.\n"
        "The interval covers validation documents, not seeds; for seeds run python train.py "
        "experiment=distill_study."
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None or not math.isfinite(value) else format(value, form)


def show_samples(run: Path, console: Console) -> None:
    """Print the last greedy sample of the first prompts of a run."""
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    last = {sample["prompt"]: sample for sample in lines if sample["method"] == "greedy"}
    for sample in list(last.values())[:PROMPT_COUNT]:
        console.rule(f"{run.name}, {sample['method']}", style="dim")
        console.print(sample["prompt"], style="bold", markup=False, highlight=False, end="")
        console.print(sample["completion"], markup=False, highlight=False)


def run_demo(folder: Path, console: Console) -> int:
    """Run all stages and print the results; return the exit code of the first stage that fails, else 0.

    Args:
        folder: parent of the run directories, relative to the checkout or, when installed, to the working directory.
    """
    begin = time.monotonic()
    plan = stages(folder)
    for number, stage in enumerate(plan, 1):
        code = run_stage(stage, folder, console)
        if code:
            console.print(
                f"\nThe demo stopped: stage {number} of {len(plan)}, {stage.name}, ended with exit code {code}."
            )
            return code
    reports = {stage.name: read_report(HOME / folder / stage.name) for stage in plan}
    console.print()
    console.print(results_table(reports))
    console.print(comparison(HOME / folder, reports), highlight=False, soft_wrap=True)
    show_samples(HOME / folder / "finetuned", console)
    console.rule()
    console.print(f"{time.monotonic() - begin:.0f} seconds in total. Reports:", highlight=False)
    for stage in plan:
        console.print(f"  {folder / stage.name / 'report.html'}", highlight=False, soft_wrap=True)
    return 0


def _program(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    if arguments:
        raise InputError(f"The demo has no arguments, but {arguments[0]} is given.\nLeave it out.")
    code = run_demo(Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S"), Console())
    if code:
        raise Exit(code)


if __name__ == "__main__":
    run_and_exit(lambda: _program(sys.argv[1:]))
