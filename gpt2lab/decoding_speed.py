"""How fast a model writes, and in how much memory."""

import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel

from gpt2lab.device import peak_memory_bytes, synchronize
from gpt2lab.generation import GREEDY, generate_ids
from gpt2lab.host_memory import give_back_freed_memory

ROUNDS = 5
CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class DecodingSpeed:
    """Of greedy decoding.

    Attributes:
        tokens_per_second: median over the rounds, of all texts that are written together.
        standard_error: of the mean over the rounds.
        memory_bytes: of the weights, and what decoding takes beside them at the most.
    """

    batch: int
    tokens_per_second: float
    standard_error: float
    memory_bytes: int


def decoding_speed(
    model: GPT2LMHeadModel, prompts: Sequence[Sequence[int]], *, tokens: int, end_of_text: int, entries: int
) -> DecodingSpeed:
    """Continue prompts together, some times over.

    Args:
        tokens: written after each prompt, fewer where a text ends before.
        entries: of the vocabulary that mean a token.
    """
    device = model.device
    before, rates = _start_of_peak(device), []
    for _ in range(ROUNDS + 1):
        synchronize(device)
        started = time.perf_counter()
        texts = generate_ids(model, prompts, GREEDY, max_new_tokens=tokens, end_of_text=end_of_text, entries=entries)
        synchronize(device)
        written = sum(min(len(text) + 1, tokens) for text in texts)
        rates.append(written / (time.perf_counter() - started))
    rates = rates[1:]  # the first one warms up
    weights = sum(parameter.nbytes for parameter in model.parameters())
    memory = weights + max(peak_memory_bytes(device) - before, 0)
    return DecodingSpeed(len(prompts), statistics.median(rates), statistics.stdev(rates) / ROUNDS**0.5, memory)


def _start_of_peak(device: torch.device) -> int:
    """Let the peak count anew where that can be done; returns the bytes in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_REFS.exists():
        give_back_freed_memory()
        with suppress(OSError):  # some containers forbid it; then the peak is the process's so far
            CLEAR_REFS.write_text("5")  # VmHWM becomes what is resident now (man 5 proc)
    return peak_memory_bytes(device)
