"""Training speed of model mini with train.py, compared with nanoGPT's model.

    python -m benchmarks.benchmark_training_step --nanogpt /path/to/nanoGPT       (make bench NANOGPT=…)

T = 256, 2,048 tokens per step, bf16, AdamW, vocabularies of 4,096 and 50,257; train.py with compile=true. "tuned" is
nanoGPT's compiled model with fused AdamW and reuse of freed memory, which train.py has. Programs alternate; values are
medians over rounds. Prints a Markdown table.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.alternation import alternate, medians
from benchmarks.shape import BATCH, CONTEXT
from benchmarks.synthetic_corpus import write_data
from benchmarks.train_command import new_run_dir, of_length, run_module, train

VOCABULARIES = (4_096, 50_257)
OURS, COMPILED, TUNED, EAGER = "train.py", "nanoGPT, compiled", "nanoGPT, compiled and tuned", "nanoGPT, eager"


def ours(folder: Path, steps: int, keys: list[str]) -> float:
    """Return the tokens per second from report.json: complete steps of train.py including data and logging."""
    arguments = ["task=pretrain", "model=mini", "optimizer=adamw", "precision=bf16", *of_length(steps), "log_every=5"]
    arguments += [f"context={CONTEXT}", f"batch_tokens={BATCH * CONTEXT}", f"micro_batch={BATCH}"]
    arguments += [f"sample_every={steps}", "logger=csv", "devices=1"]
    return train(new_run_dir(folder), [*arguments, *keys])["tokens_per_second"]


def nanogpt(
    model_file: Path,
    corpus: Path,
    vocab_size: int,
    compiled: bool,
    steps: int,
    size: str = "mini",
    timeout: float | None = None,
    tuned: bool = False,
) -> float:
    words = ["--model", str(model_file), "--corpus", str(corpus), "--vocab", str(vocab_size), "--size", size]
    words += ["--steps", str(steps), *(["--compile"] if compiled else []), *(["--tuned"] if tuned else [])]
    return run_module("nanogpt_step", *words, timeout=timeout)["tokens_per_second"]


def find_model_file(given: Path) -> Path:
    """Return nanoGPT's model.py, given the file or a checkout."""
    return (given / "model.py" if given.is_dir() else given).resolve()


def measure(
    folder: Path, model_file: Path | None, steps: int, rounds: int, vocabularies: Sequence[int] = VOCABULARIES
) -> dict[tuple[int, str], float]:
    """Return median tokens per second by (vocabulary, program)."""
    found: dict[tuple[int, str], float] = {}
    for vocab_size in vocabularies:
        data = write_data(own := folder / str(vocab_size), vocab_size)
        sides: dict[tuple[int, str], Callable[[], float]] = {
            (vocab_size, OURS): partial(ours, own, steps, [*data, "compile=true"])
        }
        if model_file is not None:
            for name, compiled, tuned in ((COMPILED, True, False), (TUNED, True, True), (EAGER, False, False)):
                theirs = partial(nanogpt, model_file, own / "corpus", vocab_size, compiled, steps, tuned=tuned)
                sides[vocab_size, name] = theirs
        found |= medians(alternate(sides, rounds))
    return found


def markdown(speeds: dict[tuple[int, str], float]) -> str:
    rows = ["| vocabulary | program | tokens/s | train.py's ÷ it |", "|--:|---|--:|--:|"]
    for (vocab_size, program), speed in speeds.items():
        rows.append(f"| {vocab_size:,} | {program} | {speed:,.0f} | {speeds[vocab_size, OURS] / speed:.2f} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, help="a nanoGPT checkout, or its model.py")
    parser.add_argument("--steps", type=int, default=40, help="steps of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES)
    options = parser.parse_args()
    model_file = options.nanogpt
    if model_file is not None:
        model_file = find_model_file(model_file)
        if not model_file.is_file():
            parser.error(f"--nanogpt {options.nanogpt}: no model.py there")
    with tempfile.TemporaryDirectory() as folder:
        print(markdown(measure(Path(folder), model_file, options.steps, options.rounds, options.vocabularies)))


if __name__ == "__main__":
    main()
