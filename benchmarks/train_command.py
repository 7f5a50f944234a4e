"""Run train.py and other programs in new processes and read what they measure."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEP_TIMES = "+callbacks.step_times._target_=benchmarks.step_times.StepTimes"


class TrainingFailed(RuntimeError):
    """train.py ended with another exit code than 0; the message contains the end of its output."""


def train(run_dir: Path, arguments: Sequence[str], timeout: float | None = None) -> dict[str, Any]:
    """Run `python train.py …` into `run_dir` and return its report.json; raises as `run_train`."""
    run_train([*arguments, f"run_dir={run_dir}"], timeout)
    return json.loads((run_dir / "report.json").read_text())


def train_timed(folder: Path, arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run train.py with StepTimes into a new folder in `folder`; return report.json and step_times.json."""
    run_dir = new_run_dir(folder)
    report = train(run_dir, [*arguments, STEP_TIMES])
    return report, json.loads((run_dir / "step_times.json").read_text())


def new_run_dir(folder: Path) -> Path:
    """Return a run directory in `folder` that does not exist yet."""
    return Path(tempfile.mkdtemp(dir=folder)) / "run"


def seconds_of_steps(report: Mapping[str, Any]) -> float:
    """Return the seconds of all steps, and of the checkpoints and exports that interrupt them."""
    return sum(report["seconds_by_phase"][phase] for phase in ("train", "save", "export"))


def run_train(arguments: Sequence[str], timeout: float | None = None) -> None:
    """Run `python train.py …`.

    Raises:
        TrainingFailed: it did not finish.
    """
    command = [sys.executable, "train.py", *arguments]
    try:
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise TrainingFailed(f"not finished after {timeout:.0f} s") from None
    if ended.returncode:
        last_lines = "\n".join((ended.stdout + ended.stderr).splitlines()[-15:])
        raise TrainingFailed(f"exit code {ended.returncode} from {' '.join(command[1:])}\n{last_lines}")


def run_module(name: str, *arguments: str, timeout: float | None = None) -> Any:
    """Run `python -m benchmarks.NAME …` in a new process and return the JSON that it prints.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    if ended.returncode:
        raise RuntimeError(f"exit code {ended.returncode} from {' '.join(command[1:])}\n{ended.stderr[-2000:]}")
    return json.loads(ended.stdout)


def of_length(steps: int) -> list[str]:
    """Return arguments of a run of these steps that validates and saves after the last one alone."""
    return [f"{key}={steps}" for key in ("steps", "validate_every", "checkpoint_every")]


def bin_data(corpus: Path, tokenizer: Path) -> list[str]:
    """Return arguments to train on a folder with train.bin and val.bin and a local tokenizer."""
    return ["data=bin", f"path={corpus}", "tokenizer=hub", f"tokenizer.source={tokenizer}"]


def tiny_run() -> list[str]:
    """Return arguments of a run that takes seconds, to test a benchmark."""
    data = ["data=text", f"path={ROOT / 'gpt2lab'}", "vocab_size=300", "context=64", "micro_batch=8"]
    return [*data, "model=nano", "model.n_embd=32", "model.n_head=2", "callbacks=minimal"]
