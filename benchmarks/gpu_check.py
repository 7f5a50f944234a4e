"""GPU check: verify the project's claims about GPUs, unattended and in limited time: `make gpu-check`.

    python -m benchmarks.gpu_check [--minutes 12] [--nanogpt /path/to/nanoGPT] [--trl-python PYTHON] [--only WORD,WORD]

A ranked list: speed beside nanoGPT with a profile, distillation beside TRL, the LM-head loss beside PyTorch, TRL and
Liger, attention kernels, determinism, medium, distillation at GPT-2 size, fp16 and the playground; then checkpoints,
precisions, resume and FSDP. Each row is appended to benchmarks/RESULTS.md, or to --results, as soon as it is known, and
what a long check has found so far before it ends. A check that would not end within the minutes is not started, and one
that takes longer than expected is ended. The whole list takes about half an hour, up to the playground 17 minutes.
TRL and Liger are those of --trl-python's environment, which needs hydra-core for the LM-head loss.

    python -m benchmarks.gpu_check --rehearse       every check that needs no GPU, with tiny models on the CPU

Without a GPU nothing else is checked and the exit code is 0.
"""

import argparse
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import gpu_bench, gpu_proofs, gpu_runs
from benchmarks.benchmark_training_step import find_model_file
from benchmarks.gpu_bench import GPU, REHEARSAL, Bench, NotRun
from benchmarks.train_command import ROOT

RESULTS = ROOT / "benchmarks" / "RESULTS.md"
TABLE_HEAD = "| check | | result | s |\n|---|---|---|--:|\n"
TIMEOUT_FACTOR = 1.3  # times the seconds of a check, after which it is ended
GRACE = 3.0  # seconds for a check to end its own processes


@dataclass(frozen=True)
class Check:
    """A claim to verify.

    Attributes:
        run: returns the result as text; raises if the claim is violated. A speed is a result, not a claim.
        seconds: that it takes on an H200, about; it is started if so much time is left.
    """

    name: str
    run: Callable[[Bench], str]
    seconds: int
    needs_gpu: bool = False


def checks(nanogpt: Path | None, trl_python: str | None, sizes: gpu_bench.Sizes) -> Iterator[Check]:
    """Return the checks, the most important first."""
    small, medium, _ = sizes.models

    def kernels(name: str, title: str, seconds: int, python: str | None = None, needs_gpu: bool = True) -> Check:
        return Check(title, partial(gpu_bench.kernels, name=name, python=python), seconds, needs_gpu)

    model_file = None if nanogpt is None else find_model_file(nanogpt)
    yield Check("small beside nanoGPT", partial(gpu_runs.compare_with_nanogpt, model_file=model_file), 230)
    yield Check("profile of small", gpu_runs.profile, 50)
    yield Check("distillation beside TRL", partial(gpu_runs.compare_with_trl, trl_python=trl_python), 200)
    yield kernels("lm_head", "LM-head loss, 16,384 positions, V = 50,257", 80, trl_python, needs_gpu=False)
    yield Check("deterministic, compiled", partial(gpu_proofs.deterministic, options=("compile=true",)), 140)
    yield Check("medium", partial(gpu_runs.speed, model=medium, options=("precision=bf16", "compile=true")), 65)
    yield Check("experiment at GPT-2 size", gpu_runs.experiment, 190)
    yield Check(
        "small, fp16", partial(gpu_runs.speed, model=small, options=("precision=fp16", "compile=true")), 60, True
    )
    yield Check("playground", gpu_proofs.playground, 25)
    yield kernels("lm_head_chunks", "LM-head loss by chunk size", 35)
    yield kernels("attention", "attention kernels", 20)
    yield Check("checkpoint every 100 steps", gpu_runs.checkpoints, 100)
    yield kernels("flash_attention", "flash attention", 20)
    yield Check("precisions", gpu_proofs.precisions, 130, needs_gpu=True)
    yield Check("resume after kill -9", gpu_proofs.resume_after_a_kill, 70)
    packed = ("compile=false", "packing=true")
    yield Check("deterministic, packed documents", partial(gpu_proofs.deterministic, options=packed), 110)
    yield Check("deterministic distillation", gpu_proofs.deterministic_distillation, 110)
    yield Check("FSDP on one GPU", gpu_proofs.fsdp_on_one_gpu, 45, needs_gpu=True)
    yield Check("distillation with default values", gpu_runs.distil_with_defaults, 110, needs_gpu=True)
    recomputed = ("precision=bf16", "compile=false", "activation_checkpointing=true")
    yield Check("medium, activations recomputed", partial(gpu_runs.speed, model=medium, options=recomputed), 45)
    yield kernels("packed_documents", "packed documents", 40)
    yield kernels("packed_prefixes", "packed prefixes", 20)


class OutOfTime(BaseException):
    """A check takes too long; not an Exception, so that no library takes it for one of its own."""


@contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block after so many seconds; in the main thread only."""

    def end(*_unused: object) -> None:
        raise OutOfTime(f"not finished after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(check: Check, bench: Bench) -> tuple[str, str]:
    """Return ("passed" | "FAILED" | "not run", result)."""
    if bench.on_gpu and bench.seconds_left < check.seconds:
        return "not run", f"{bench.seconds_left:.0f} s were left, about {check.seconds} are needed"
    if check.needs_gpu and not bench.on_gpu:
        return "not run", "needs a GPU"
    seconds = min(TIMEOUT_FACTOR * check.seconds, bench.seconds_left) if bench.on_gpu else bench.seconds_left
    try:
        with ended_after(seconds + GRACE):
            return "passed", check.run(replace(bench, deadline=time.monotonic() + seconds))
    except NotRun as reason:
        return "not run", str(reason)
    except (Exception, OutOfTime) as error:  # whatever a library raises, the other checks are run
        return "FAILED", " ".join(f"{type(error).__name__}: {error}".split())[-600:]


def append(text: str, file: Path | None) -> None:
    """Print text and append it to a file that survives the end of this process."""
    print(text, end="", flush=True)
    if file is not None:
        with file.open("a", encoding="utf-8") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())


def verify(checked: Iterator[Check], bench: Bench, file: Path | None) -> list[str]:
    """Run the checks in their order, write a row for each, and return the verdicts."""
    bench.write_inputs()
    verdicts = []
    for check in checked:
        started = time.monotonic()

        def write(verdict: str, result: str, name: str = check.name, started: float = started) -> None:
            seconds = time.monotonic() - started
            append(f"| {name} | {verdict} | {result.replace('|', '/')} | {seconds:.0f} |\n", file)

        verdict, result = outcome(check, replace(bench, note=partial(write, "so far")))
        write(verdict, result)
        verdicts.append(verdict)
    return verdicts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=12.0, help="by then every check has ended (default: 12)")
    parser.add_argument("--nanogpt", type=Path, help="a nanoGPT checkout, or its model.py")
    parser.add_argument("--trl-python", help="the Python of an environment that has TRL")
    parser.add_argument("--only", default="", help="checks that have one of these words in their names")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file that the rows are appended to")
    parser.add_argument("--rehearse", action="store_true", help="tiny models on the CPU; nothing is written")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.rehearse:
        print("gpu-check: skipped, because PyTorch finds no GPU.")
        return 0
    sizes = REHEARSAL if options.rehearse else GPU
    deadline = time.monotonic() + 60 * options.minutes
    device = "a CPU, tiny models" if options.rehearse else torch.cuda.get_device_name()
    file = None if options.rehearse else options.results
    append(f"\n## {time.strftime('%Y-%m-%d')}, {device}, torch {torch.__version__}\n\n{TABLE_HEAD}", file)
    wanted = options.only.split(",")
    every = checks(options.nanogpt, options.trl_python, sizes)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:  # an ended run may still write
        some = (check for check in every if any(word in check.name for word in wanted))
        verdicts = verify(some, Bench(Path(scratch), sizes, deadline), file)
    return 1 if "FAILED" in verdicts else 0


if __name__ == "__main__":
    raise SystemExit(main())
