"""Training tokens and seconds until the final validation loss of nanoGPT's recipe is reached.

    python -m benchmarks.benchmark_tokens_to_loss [--model micro] [--data stdlib] [--seeds 1 2 3 4 5]
    python -m benchmarks.benchmark_tokens_to_loss --baseline batch_tokens=2048 optimizer.lr=2e-3 --ours model.dropout=0

The baseline is AdamW (β 0.9 and 0.95, weight decay 0.1, clipping at 1.0) with a cosine schedule to a tenth. The other
side is this project's default, for several shares of the baseline's tokens; each is a whole run with its own decay.
Further keys are those of train.py, for either side. Between two shares the loss is interpolated linearly in the
logarithm of the tokens; "≤" is for the smallest share, where that suffices. Prints a Markdown table with the share that
reaches the baseline's loss, by seed.
"""

import argparse
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.train_command import of_length, tiny_run, train
from gpt2lab.evaluation.paired_statistics import paired_difference

BASELINE = ("optimizer=adamw", "schedule=cosine", "schedule.final_fraction=0.1")
SHARES = (0.2, 0.3, 0.45)
BATCH = "batch_tokens="
VALIDATED = 250_000  # tokens: the validation of packages would take a third of the time


@dataclass(frozen=True)
class RunResult:
    """Validation loss in nats per token, and seconds of training."""

    loss: float
    seconds: float


@dataclass(frozen=True)
class Sides:
    """Arguments of train.py for both sides, without the length and the seed, and the baseline's tokens."""

    baseline: list[str]
    ours: list[str]
    tokens: int


def run(folder: Path, keys: Sequence[str], tokens: float, seed: int) -> RunResult:
    batch = next(int(key.removeprefix(BATCH)) for key in reversed(keys) if key.startswith(BATCH))
    steps = max(round(tokens / batch), 1)
    usual = [*of_length(steps), f"seed={seed}", "callbacks=minimal", "callbacks.final_score=null", "logger=csv"]
    usual.append(f"validate_tokens={VALIDATED}")
    report = train(folder / f"{steps}-{seed}", [*keys, *usual])
    return RunResult(report["val_loss"], report["seconds_by_phase"]["train"])


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
    """Train both sides with every seed, print a row for each, and return the difference at the largest share."""
    print("| seed | baseline's loss | losses at shares of its tokens | share that reaches it | seconds, share |")
    print("|--:|--:|---|--:|--:|", flush=True)
    baseline, longest = {}, {}
    for seed in seeds:
        theirs = run(folder / "baseline", sides.baseline, sides.tokens, seed)
        ended = {share: run(folder / "ours", sides.ours, share * sides.tokens, seed) for share in shares}
        needed = share_at(theirs.loss, {share: one.loss for share, one in ended.items()})
        pace = sum(one.seconds for one in ended.values()) / sum(shares)  # seconds for all of the baseline's tokens
        losses = ", ".join(f"{share:g}: {one.loss:.4f}" for share, one in ended.items())
        most = "≤ " if ended[min(shares)].loss <= theirs.loss else ""
        cells = f"{most}{needed:.2f} | {most}{needed * pace / theirs.seconds:.2f}"
        print(f"| {seed} | {theirs.loss:.4f} | {losses} | {cells} |", flush=True)
        baseline[seed], longest[seed] = theirs.loss, ended[max(shares)].loss
    found = paired_difference(longest, baseline)
    interval = f" ({found.low:+.4f} … {found.high:+.4f})" if found.low is not None else ""
    return f"\nAt the largest share the loss differs by {found.mean:+.4f}{interval} nats."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="micro")
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--tokens", type=int, default=1_638_400, help="of the baseline")
    parser.add_argument("--batch", type=int, default=4_096, help="tokens of a step, of both sides")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--baseline", nargs="*", default=[], metavar="key=value", help="further keys of the baseline")
    parser.add_argument("--ours", nargs="*", default=[], metavar="key=value", help="further keys of our side")
    parser.add_argument("--tiny", action="store_true", help="takes seconds; results are meaningless")
    options = parser.parse_args()
    usual = tiny_run() if options.tiny else [f"model={options.model}", f"data={options.data}"]
    usual.append(f"{BATCH}{options.batch}")
    sides = Sides([*usual, *BASELINE, *options.baseline], [*usual, *options.ours], options.tokens)
    with tempfile.TemporaryDirectory() as scratch:
        print(compare(Path(scratch), sides, options.seeds, options.shares))


if __name__ == "__main__":
    main()
