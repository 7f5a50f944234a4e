"""Training speed of model mini with train.py, eager and compiled, compared with nanoGPT's model.

    python -m benchmarks.benchmark_training_step --nanogpt /path/to/nanoGPT       (make bench NANOGPT=…)

T = 256, 2,048 tokens per step, bf16, AdamW, vocabularies of 4,096 and 50,257. Programs alternate; values are medians
over rounds; ratios are to nanoGPT's best of eager and compiled. Prints a Markdown table.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks.shape import BATCH, CONTEXT
from benchmarks.synthetic_corpus import write_corpus, write_tokenizer
from benchmarks.train_command import ROOT, bin_data, train

VOCABULARIES = (4_096, 50_257)


def ours(corpus: Path, tokenizer: Path, run_dir: Path, steps: int, keys: list[str]) -> float:
    """Return the tokens per second from report.json: complete steps of train.py including data and logging."""
    arguments = ["task=pretrain", "model=mini", *bin_data(corpus, tokenizer), "optimizer=adamw", "precision=bf16"]
    arguments += [f"context={CONTEXT}", f"batch_tokens={BATCH * CONTEXT}", f"micro_batch={BATCH}", f"steps={steps}"]
    arguments += [f"validate_every={steps}", f"checkpoint_every={steps}", f"sample_every={steps}", "log_every=5"]
    arguments += ["logger=csv", "devices=1", *keys]
    return train(run_dir, arguments)["tokens_per_second"]


def nanogpt(
    model_file: Path,
    corpus: Path,
    vocab_size: int,
    compiled: bool,
    steps: int,
    size: str = "mini",
    timeout: float | None = None,
) -> float:
    command = [sys.executable, "-m", "benchmarks.nanogpt_step", "--model", str(model_file), "--corpus", str(corpus)]
    command += ["--vocab", str(vocab_size), "--size", size, "--steps", str(steps), *(["--compile"] if compiled else [])]
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=timeout, check=True)
    return json.loads(ended.stdout)["tokens_per_second"]


def find_model_file(given: Path) -> Path:
    """Return nanoGPT's model.py, given the file or a checkout."""
    return (given / "model.py" if given.is_dir() else given).resolve()


def measure(
    folder: Path, model_file: Path | None, steps: int, rounds: int, vocabularies: Sequence[int] = VOCABULARIES
) -> dict[tuple[int, str, bool], float]:
    """Return median tokens per second by (vocabulary, program, compiled)."""
    speeds: dict[tuple[int, str, bool], list[float]] = defaultdict(list)
    for vocab_size in vocabularies:
        corpus, tokenizer = folder / f"corpus-{vocab_size}", folder / f"tokenizer-{vocab_size}"
        write_corpus(corpus, vocab_size)
        write_tokenizer(tokenizer, vocab_size)
        for number in range(rounds):
            for compiled in (False, True):
                run_dir = folder / f"run-{vocab_size}-{number}-{compiled}"
                speed = ours(corpus, tokenizer, run_dir, steps, [f"compile={str(compiled).lower()}"])
                speeds[vocab_size, "train.py", compiled].append(speed)
                print(f"V={vocab_size} train.py compile={compiled}: {speed:,.0f} tokens/s", file=sys.stderr)
                if model_file is not None:
                    speed = nanogpt(model_file, corpus, vocab_size, compiled, steps)
                    speeds[vocab_size, "nanoGPT", compiled].append(speed)
                    print(f"V={vocab_size} nanoGPT compile={compiled}: {speed:,.0f} tokens/s", file=sys.stderr)
    return {key: statistics.median(values) for key, values in speeds.items()}


def markdown(speeds: dict[tuple[int, str, bool], float]) -> str:
    rows = [
        "| vocabulary | program | eager, tokens/s | compiled, tokens/s | best ÷ nanoGPT's best |",
        "|--:|---|--:|--:|--:|",
    ]
    best = {key[:2]: max(speeds[*key[:2], False], speeds[*key[:2], True]) for key in speeds}
    for vocab_size, program in best:
        reference = best.get((vocab_size, "nanoGPT"))
        ratio = f"{best[vocab_size, program] / reference:.2f}" if reference else ""
        eager, compiled = (speeds[vocab_size, program, kind] for kind in (False, True))
        rows.append(f"| {vocab_size:,} | {program} | {eager:,.0f} | {compiled:,.0f} | {ratio} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, help="a nanoGPT checkout, or its model.py")
    parser.add_argument("--steps", type=int, default=40, help="steps of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
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
