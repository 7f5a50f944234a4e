"""Ten students of one teacher on the same batches: the teacher asked at every step of each, or once for all.

    python -m benchmarks.benchmark_ten_students

Student 4 layers, width 256; teacher 8 layers, width 512; random weights and tokens, 4,096 entries; 2,048 targets a
step; ten learning rates, a sweep of train.py on the CPU. A figure is the wall time of the whole command: the start of
each process, validation and export included, and for the cached side the writing of the cache, which each round does
anew. The sides take turns. Prints a Markdown table.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.benchmark_distill import FULL, TINY, Sizes
from benchmarks.synthetic_corpus import write_corpus, write_tokenizer
from benchmarks.train_command import ROOT, bin_data
from gpt2lab.model.backbone import Backbone, plain_hf

STEPS = 200
ONLINE, CACHED = "teacher asked at every step", "teacher cached: 12 draws a token"
KEYS = {ONLINE: ["teacher_cache=none"], CACHED: ["teacher_cache=sampled"]}


def sweep(folder: Path, sizes: Sizes, vocab_size: int, students: int, keys: list[str], cache: Path) -> float:
    """Seconds of one sweep into `folder`.

    Raises:
        RuntimeError: a job failed.
    """
    student = sizes.student
    rates = ",".join(f"{(number + 1) * 2e-4:.1e}" for number in range(students))
    words = ["task=distill", f"teacher={folder / 'teacher'}", "preflight=off", "model=micro", f"optimizer.lr={rates}"]
    words += [*bin_data(folder / "corpus", folder / "tokenizer"), f"model.n_layer={student.n_layer}"]
    words += [f"model.n_head={student.n_head}", f"model.n_embd={student.n_embd}", "optimizer=adamw"]
    words += [f"context={sizes.context}", f"batch_tokens={sizes.targets}", f"cache_dir={cache}", "logger=none"]
    words += [f"{key}={sizes.steps}" for key in ("steps", "validate_every", "checkpoint_every")]
    words += ["callbacks=minimal", "accelerator=cpu", "devices=1", f"threads={sizes.threads}", "loss=forward_kl", *keys]
    start = time.perf_counter()
    command = [sys.executable, "train.py", "-m", *words, f"hydra.sweep.dir={cache / 'sweep'}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"exit code {ended.returncode}\n{(ended.stdout + ended.stderr)[-2000:]}")
    return time.perf_counter() - start


def measure(sizes: Sizes, vocab_size: int, students: int) -> dict[str, float]:
    """Side → median seconds over the rounds."""
    seconds: dict[str, list[float]] = {side: [] for side in KEYS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # Enough for every step to have text of its own
        write_corpus(folder / "corpus", vocab_size, train_tokens=sizes.targets * sizes.steps + sizes.context + 1)
        write_tokenizer(folder / "tokenizer", vocab_size)
        torch.manual_seed(1)
        plain_hf(Backbone(replace(sizes.teacher, vocab_size=vocab_size))).save_pretrained(folder / "teacher")
        for number in tqdm(range(sizes.rounds * len(KEYS)), "sweeps", disable=None):
            side = list(KEYS)[number % len(KEYS)]
            seconds[side].append(sweep(folder, sizes, vocab_size, students, KEYS[side], folder / f"cache-{number}"))
    return {side: statistics.median(found) for side, found in seconds.items()}


def markdown(seconds: dict[str, float], students: int) -> str:
    """A row for each side."""
    head = [f"| {students} students | s | ÷ asked at every step |", "|---|--:|--:|"]
    return "\n".join(
        [*head, *(f"| {side} | {own:.0f} | {own / seconds[ONLINE]:.2f} |" for side, own in seconds.items())]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--tiny", action="store_true", help="sizes of seconds: that it runs, not how fast")
    options = parser.parse_args()
    sizes = TINY if options.tiny else replace(FULL, rounds=options.rounds, steps=options.steps)
    students = 2 if options.tiny else 10
    print(markdown(measure(sizes, min(sizes.vocabularies), students), students))


if __name__ == "__main__":
    main()
