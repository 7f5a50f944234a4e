"""Tokens per second of scoring a text, compared with a plain loop over `transformers`' GPT2LMHeadModel.

    python -m benchmarks.benchmark_evaluation

Models with random weights, exported and loaded by both sides, on the CPU; freed memory is reused on both. Ours is
`score`, with which evaluate.py computes the loss, accuracy and calibration of a text and their standard errors. Theirs
computes the mean loss alone, with SDPA in inference mode: from labels or with F.cross_entropy on the logits; in bf16 by
autocast, as ours, or with bf16 weights. The fastest of them is the one in the table. Both score the same windows of the
same text, and the losses are compared. Sides alternate in one process; the first round is warm-up; values are medians
over rounds with the smallest and the largest in brackets.
"""

import argparse
import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2LMHeadModel

from benchmarks.alternation import alternate_speeds, beside_fastest
from benchmarks.shape import PRECISIONS, SHAPES, TINY
from gpt2lab.data.batch import Batch
from gpt2lab.evaluation.evaluation import score
from gpt2lab.model.backbone import Backbone, load_backbone, to_hf
from gpt2lab.settings import ModelShape
from gpt2lab.system.malloc_tuning import keep_freed_memory
from launch.logging_setup import silence_libraries

MODELS = ("nano", "micro", "small")
CONTEXTS = {"small": (256, 1_024)}  # of the other models 256
BATCH_TOKENS = 2_048
VOCABULARIES = (4_096, 50_257)
TOLERANCES = {"fp32": 1e-4, "bf16": 1e-2}  # nats per token, between the losses of both sides
OURS, LABELS, LOGITS = "ours", "labels", "F.cross_entropy"

Side = Callable[[], float]  # returns the mean loss of the text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", choices=SHAPES, nargs="+", default=MODELS)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--precisions", choices=PRECISIONS, nargs="+", default=tuple(PRECISIONS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=4_096, help="of the text")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tiny", action="store_true", help="takes seconds; results are meaningless")
    options = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    print(f"CPU, {options.threads} threads, a text of {options.tokens} tokens, {options.rounds} rounds\n")
    print("| model | vocabulary | precision | context | fastest of theirs | theirs, tokens/s | ours, tokens/s ", end="")
    print("| ours ÷ theirs | difference of the losses |\n|---|--:|---|--:|---|--:|--:|--:|--:|")
    shapes = {"tiny": TINY} if options.tiny else {name: SHAPES[name] for name in options.models}
    vocabularies = (300,) if options.tiny else options.vocabularies
    for (name, sizes), vocab_size in itertools.product(shapes.items(), vocabularies):
        shape = replace(sizes, vocab_size=vocab_size)
        for precision, context in itertools.product(options.precisions, CONTEXTS.get(name, (256,))):
            row = evaluation_row(shape, precision, context, options.tokens, options.rounds)
            print(f"| {name} | {vocab_size:,} | {precision} | {context:,} | {row}", flush=True)


def evaluation_row(shape: ModelShape, precision: str, context: int, tokens: int, rounds: int) -> str:
    """Measure a row, from the name of the fastest of their sides on.

    Raises:
        RuntimeError: the losses of two sides differ.
    """
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        to_hf(Backbone(shape)).save_pretrained(folder)
        sides = their_sides(folder, precision, batches := text_batches(shape.vocab_size, context, tokens))
        sides[OURS] = partial(our_loss, load_backbone(folder), precision, batches)
    targets = sum(batch.target_tokens for batch in batches)
    speeds, losses = alternate_speeds(sides, rounds, lambda _loss: targets)
    for name, loss in losses.items():
        if not abs(loss - losses[OURS]) < TOLERANCES[precision]:
            raise RuntimeError(f"The loss of {name} is {loss:.6f}, ours {losses[OURS]:.6f}.")
    fastest, cells = beside_fastest(speeds, OURS)
    return f"{fastest} | {' | '.join(cells)} | {abs(losses[fastest] - losses[OURS]):.0e} |"


def text_batches(vocab_size: int, context: int, tokens: int) -> list[Batch]:
    """Split a random text into batches of windows."""
    windows, rows = max(tokens // context, 1), max(BATCH_TOKENS // context, 1)
    text = torch.randint(vocab_size, (windows * context + 1,))
    parts = zip(
        text[:-1].view(windows, context).split(rows),
        text[1:].view(windows, context).split(rows),
        torch.arange(windows).split(rows),
        strict=True,
    )
    return [Batch(ids, labels, labels.numel(), numbers) for ids, labels, numbers in parts]  # (B, T), (B, T), (B,)


def our_loss(backbone: Backbone, precision: str, batches: Sequence[Batch]) -> float:
    """Score the text as evaluate.py does."""
    token_bytes = torch.ones(backbone.shape.vocab_size, dtype=torch.int64)
    autocast = None if precision == "fp32" else PRECISIONS[precision]
    return score(backbone, batches, token_bytes, device=torch.device("cpu"), autocast=autocast).loss


def their_sides(folder: str, precision: str, batches: Sequence[Batch]) -> dict[str, Side]:
    """Return the plain loops by name."""
    dtype = PRECISIONS[precision]
    sides: dict[str, Side] = {}
    for weights in {torch.float32, dtype}:
        model = GPT2LMHeadModel.from_pretrained(folder, dtype=weights, attn_implementation="sdpa").eval()
        uses_autocast = weights != dtype
        suffix = "" if precision == "fp32" else ", autocast" if uses_autocast else ", bf16 weights"
        for name in (LABELS, LOGITS):
            sides[name + suffix] = partial(their_loss, model, name, dtype if uses_autocast else None, batches)
    return sides


@torch.inference_mode()
def their_loss(model: GPT2LMHeadModel, how: str, autocast: torch.dtype | None, batches: Sequence[Batch]) -> float:
    """Return the mean loss of the text by a plain loop."""
    total, targets = 0.0, 0
    for batch in batches:
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = _mean_loss(model, how, batch)
        total += loss.item() * batch.target_tokens
        targets += batch.target_tokens
    return total / targets


def _mean_loss(model: GPT2LMHeadModel, how: str, batch: Batch) -> Tensor:
    if how == LABELS:  # shift_labels are the next tokens, one for each position
        return model(batch.input_ids, labels=batch.labels, shift_labels=batch.labels, use_cache=False).loss
    logits = model(batch.input_ids, use_cache=False).logits  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten())


if __name__ == "__main__":
    main()
