"""Training tokens and seconds until the final validation loss of nanoGPT's recipe is reached.

    python -m benchmarks.benchmark_tokens_to_loss [--model micro] [--data stdlib] [--steps 800] [--seeds 1 2 3 4 5]
    python -m benchmarks.benchmark_tokens_to_loss --lr 2e-3 --baseline-lr 3e-3 model.dropout=0

The baseline is AdamW (β 0.9 and 0.95, weight decay 0.1, clipping at 1.0) with a cosine schedule to a tenth. The other
side is this project's default, with further keys if given, for several shares of the baseline's steps; each is a whole
run with its own decay. Between two shares the loss is interpolated linearly in the logarithm of the tokens. Both sides
take the same batches. Prints a Markdown table with the share that reaches the baseline's loss, by seed.
"""

import argparse
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.train_command import tiny_run, train
from gpt2lab.evaluation.paired_statistics import paired_difference

BASELINE = ("optimizer=adamw", "schedule=cosine", "schedule.final_fraction=0.1")
SHARES = (0.3, 0.45, 0.6)


@dataclass(frozen=True)
class Ended:
    """Validation loss in nats per token, and seconds of training."""

    loss: float
    seconds: float


@dataclass(frozen=True)
class Sides:
    """Arguments of train.py for both sides, without the number of steps and the seed."""

    baseline: list[str]
    ours: list[str]
    steps: int


def run(folder: Path, keys: Sequence[str], steps: int, seed: int) -> Ended:
    lengths = [f"steps={steps}", f"validate_every={steps}", f"checkpoint_every={steps}"]
    report = train(folder / f"{steps}-{seed}", [*keys, *lengths, f"seed={seed}", "callbacks=minimal", "logger=csv"])
    return Ended(report["val_loss"], report["seconds_by_phase"]["train"])


def share_at(loss: float, losses: Mapping[float, float]) -> float:
    """Return the share of tokens at which the loss is reached; infinity if no share reaches it.

    Args:
        losses: share → final loss, decreasing. Below the smallest share nothing is known: it is returned itself.
    """
    shares = sorted(losses)
    if losses[shares[0]] <= loss:
        return shares[0]
    for before, after in pairwise(shares):
        if losses[after] <= loss:
            part = (losses[before] - loss) / (losses[before] - losses[after])
            return math.exp(math.log(before) + part * (math.log(after) - math.log(before)))
    return math.inf


def compare(folder: Path, sides: Sides, seeds: Sequence[int], shares: Sequence[float]) -> str:
    """Train both sides with every seed and format a row for each."""
    rows = ["| seed | baseline's loss | losses at shares of its steps | share that reaches it | seconds, share |"]
    rows.append("|--:|--:|---|--:|--:|")
    baseline, longest = {}, {}
    for seed in seeds:
        theirs = run(folder / "baseline", sides.baseline, sides.steps, seed)
        ended = {share: run(folder / "ours", sides.ours, round(share * sides.steps), seed) for share in shares}
        needed = share_at(theirs.loss, {share: one.loss for share, one in ended.items()})
        pace = sum(one.seconds for one in ended.values()) / sum(shares)  # seconds for all of the baseline's steps
        losses = ", ".join(f"{share:g}: {one.loss:.4f}" for share, one in ended.items())
        seconds = needed * pace / theirs.seconds
        rows.append(f"| {seed} | {theirs.loss:.4f} | {losses} | {needed:.2f} | {seconds:.2f} |")
        print(rows[-1], flush=True)
        baseline[seed], longest[seed] = theirs.loss, ended[max(shares)].loss
    found = paired_difference(longest, baseline)
    interval = f" ({found.low:+.4f} … {found.high:+.4f})" if found.low is not None else ""
    return "\n".join([*rows, f"\nAt the largest share the loss differs by {found.mean:+.4f}{interval} nats."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="micro")
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--steps", type=int, default=800, help="of the baseline")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--lr", help="of this project's recipe (default: its default for the size)")
    parser.add_argument("--baseline-lr", help="of AdamW (default: the default for the size)")
    parser.add_argument("--tiny", action="store_true", help="takes seconds; results are meaningless")
    parser.add_argument("keys", nargs="*", metavar="key=value", help="further keys of this project's recipe")
    options = parser.parse_args()
    usual = tiny_run() if options.tiny else [f"model={options.model}", f"data={options.data}"]
    lr = [f"optimizer.lr={options.lr}"] if options.lr else []
    baseline_lr = [f"optimizer.lr={options.baseline_lr}"] if options.baseline_lr else []
    sides = Sides([*usual, *BASELINE, *baseline_lr], [*usual, *lr, *options.keys], options.steps)
    with tempfile.TemporaryDirectory() as scratch:
        print(compare(Path(scratch), sides, options.seeds, options.shares))


if __name__ == "__main__":
    main()
