"""Validation loss of each precision compared with fp32 and the same seed: nano, 300 steps on the standard library.

    python -m benchmarks.benchmark_precisions                                 on a CPU, without fp16
    python -m benchmarks.benchmark_precisions optimizer=adamw                 with other keys of train.py
    python -m benchmarks.benchmark_precisions --accelerator gpu --at-once 5

Each precision is a sweep of train.py over the seeds; several can share a GPU, because only losses are measured. A seed
has the same initial weights and batches in all sweeps, so differences are paired by seed. Prints a Markdown table; a
precision is within if no seed differs by more than 0.02 nats from fp32.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.train_command import run_train, train
from gpt2lab.evaluation.paired_statistics import PairedDifference, paired_difference

EXACT = "fp32"
OTHERS = {"cpu": ("bf16", "bf16_true"), "gpu": ("bf16", "bf16_true", "fp16")}
SEEDS = (1, 2, 3)
STEPS = 300
SAME_LOSS = 0.02  # nats

Losses = Mapping[str, dict[int, float]]  # precision → seed → val/loss


def measure_losses(
    folder: Path, accelerator: str, keys: Sequence[str] = (), precisions: Sequence[str] = (), at_once: int = 1
) -> Losses:
    """Train into `folder` with fp32 and the given precisions, by default all of the device.

    Args:
        keys: further keys of train.py.
        at_once: number of sweeps that share the device.

    Raises:
        TrainingFailed: a sweep ended with another exit code than 0.
    """
    usual = ["task=pretrain", "data=stdlib", "model=nano", f"steps={STEPS}", "logger=csv", "callbacks=minimal"]
    usual += [f"accelerator={accelerator}", "devices=1", "threads=1", *keys]
    if at_once > 1:
        train(folder / "prepares", [*usual, "steps=1"])  # prepare the data once

    def sweep(precision: str) -> dict[int, float]:
        target = folder / precision
        seeds = f"seed={','.join(map(str, SEEDS))}"
        run_train(["-m", *usual, f"precision={precision}", seeds, f"hydra.sweep.dir={target}"])
        reports = [json.loads((target / str(job) / "report.json").read_text()) for job in range(len(SEEDS))]
        return {seed: report["val_loss"] for seed, report in zip(SEEDS, reports, strict=True)}

    names = (EXACT, *(precisions or OTHERS[accelerator]))
    with ThreadPoolExecutor(at_once) as pool:
        return dict(zip(names, pool.map(sweep, names), strict=True))


def compare_with_exact(losses: Losses) -> dict[str, PairedDifference]:
    """Return the losses minus those of fp32, by precision."""
    return {name: paired_difference(found, losses[EXACT]) for name, found in losses.items() if name != EXACT}


def is_within(found: PairedDifference) -> bool:
    """Whether every seed's loss is close to that of fp32."""
    return not found.missing and all(abs(difference) < SAME_LOSS for difference in found.differences.values())


def markdown(losses: Losses) -> str:
    """Format a table with a row per precision."""
    head = [f"| precision | val/loss of seeds {', '.join(map(str, SEEDS))} | mean | − fp32, 95 % interval | within |"]
    rows = [*head, "|---|---|--:|--:|---|"]
    compared = compare_with_exact(losses)
    for name, found in losses.items():
        row = (
            f"| {name} | {', '.join(f'{loss:.4f}' for loss in found.values())} | {sum(found.values()) / len(found):.4f}"
        )
        cells = ["", ""]
        if name in compared:
            difference = compared[name]
            interval = f"{difference.low:+.4f} … {difference.high:+.4f}" if difference.low is not None else "one seed"
            cells = [f"{difference.mean:+.4f} ({interval})", "yes" if is_within(difference) else "no"]
        rows.append(" | ".join([row, *cells]) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accelerator", choices=OTHERS, default="cpu")
    parser.add_argument("--precisions", nargs="+", default=(), help="compared with fp32; default: all of the device")
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("keys", nargs="*", metavar="key=value")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure_losses(Path(scratch), options.accelerator, options.keys, options.precisions, options.at_once)
    print(markdown(found))


if __name__ == "__main__":
    main()
