"""The demo: pretrain a teacher, distil it, compare with training from scratch, fine-tune — all through train.py.

    make demo        or        python -m launch.commands.demo

Each stage is a command that you could have typed; it is printed before it runs. Everything lies in runs/demo-<time>.
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

from gpt2lab.evaluation.document_losses import loss_difference, read_document_losses

ROOT = Path(__file__).resolve().parents[2]

# Optimizer steps of each stage: four minutes in all on two CPU cores with bf16 in hardware.
TEACHER_STEPS = 320
STUDENT_STEPS = 200
FINETUNE_STEPS = 120

PROMPT_COUNT = 3


@dataclass(frozen=True)
class Stage:
    """One command of the demo; `name` is also its run directory's."""

    name: str
    title: str
    arguments: tuple[str, ...]


def stages(folder: Path) -> list[Stage]:
    """The four commands. The two students differ in the teacher alone: same seed, start, batches and schedule."""
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
    """Run one command, its output passing through; its exit code."""
    command = ["train.py", *stage.arguments, f"run_dir={folder / stage.name}"]
    console.rule(f"[bold]{stage.title}")
    console.print("python " + shlex.join(command), style="dim", markup=False, highlight=False, soft_wrap=True)
    return subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode


def read_report(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())


def results_table(reports: dict[str, dict[str, Any]]) -> Table:
    """One row for each stage, from its report.json."""
    table = Table(title="What was trained", box=SIMPLE_HEAD, padding=0)  # fits into 80 columns
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
    """How far the distilled student's loss is below the one trained from scratch, paired by document."""
    runs = ("distilled", "scratch")
    ours, theirs = (reports[run]["val_loss"] for run in runs)
    difference = loss_difference(*(read_document_losses(folder / run) for run in runs))
    found = f"{ours - theirs:+.3f} nats".replace("-", "−") if difference is None else str(difference)
    return (
        f"At equal tokens, loss of the distilled student minus the scratch one's: {found}.\n"
        "The interval is over validation documents; another seed is another error (python train.py "
        "experiment=distill_study)."
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None or not math.isfinite(value) else format(value, form)


def show_samples(run: Path, console: Console) -> None:
    """The last texts of a run, the likeliest one for each prompt."""
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    last = {sample["prompt"]: sample for sample in lines if sample["method"] == "greedy"}
    for sample in list(last.values())[:PROMPT_COUNT]:
        console.rule(f"{run.name}, {sample['method']}", style="dim")
        console.print(sample["prompt"], style="bold", markup=False, highlight=False, end="")
        console.print(sample["completion"], markup=False, highlight=False)


def run_demo(folder: Path, console: Console) -> int:
    """Run all stages into `folder` and show what came out; the exit code of the first stage that fails, else 0."""
    started = time.monotonic()
    plan = stages(folder)
    for number, stage in enumerate(plan, 1):
        code = run_stage(stage, folder, console)
        if code:
            console.print(
                f"\nThe demo stopped: stage {number} of {len(plan)}, {stage.name}, ended with exit code {code}."
            )
            return code
    reports = {stage.name: read_report(ROOT / folder / stage.name) for stage in plan}
    console.print()
    console.print(results_table(reports))
    console.print(comparison(ROOT / folder, reports), highlight=False, soft_wrap=True)
    show_samples(ROOT / folder / "finetuned", console)
    console.rule()
    console.print(f"{time.monotonic() - started:.0f} seconds in all. The reports, for a browser:", highlight=False)
    for stage in plan:
        console.print(f"  {folder / stage.name / 'report.html'}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_demo(Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S"), Console()))
