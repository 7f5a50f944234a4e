"""Run train.py in a process and read the run's report."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class TrainingFailed(RuntimeError):
    """train.py ended with another exit code than 0; the message contains the end of its output."""


def train(run_dir: Path, arguments: Sequence[str], timeout: float | None = None) -> dict[str, Any]:
    """Run `python train.py …` into `run_dir` and return its report.json; raises as `run_train`."""
    run_train([*arguments, f"run_dir={run_dir}"], timeout)
    return json.loads((run_dir / "report.json").read_text())


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


def bin_data(corpus: Path, tokenizer: Path) -> list[str]:
    """Return arguments to train on a folder with train.bin and val.bin and a local tokenizer."""
    return ["data=bin", f"path={corpus}", "tokenizer=hub", f"tokenizer.source={tokenizer}"]


def tiny_run() -> list[str]:
    """Return arguments of a run that takes seconds, to test a benchmark."""
    data = ["data=text", f"path={ROOT / 'gpt2lab'}", "vocab_size=300", "context=64", "micro_batch=8"]
    return [*data, "model=nano", "model.n_embd=32", "model.n_head=2", "callbacks=minimal"]
