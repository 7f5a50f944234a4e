"""How fast a model writes, and in how much memory."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel
from transformers.generation.streamers import BaseStreamer

from gpt2lab.generation.sampling import GREEDY, generate_ids
from gpt2lab.system.device import peak_memory_bytes, synchronize
from gpt2lab.system.malloc_tuning import give_back_freed_memory

ROUNDS, DRAWS = 5, 1000
CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class DecodingSpeed:
    """Of greedy decoding; medians over the rounds, with the bootstrap's standard errors of these medians.

    Attributes:
        tokens_per_second: of all texts that are written together.
        memory_bytes: of the weights, and what decoding takes beside them at the most; None where that is not known.
    """

    batch: int
    tokens_per_second: float
    standard_error: float
    memory_bytes: int | None
    memory_standard_error: float | None


def decoding_speed(
    model: GPT2LMHeadModel, prompts: Sequence[Sequence[int]], *, tokens: int, end_of_text: int, entries: int
) -> DecodingSpeed:
    """Continue prompts together, some times over.

    Args:
        tokens: written after each prompt, fewer where a text ends before.
        entries: of the vocabulary that mean a token.
    """
    device, weights = model.device, sum(parameter.nbytes for parameter in model.parameters())
    rates, peaks = [], []
    for _ in range(ROUNDS + 1):
        before = _start_of_peak(device)
        synchronize(device)
        started = time.perf_counter()
        texts = generate_ids(model, prompts, GREEDY, max_new_tokens=tokens, end_of_text=end_of_text, entries=entries)
        synchronize(device)
        written = sum(min(len(text) + 1, tokens) for text in texts)
        rates.append(written / (time.perf_counter() - started))
        if before is not None:
            peaks.append(weights + max(peak_memory_bytes(device) - before, 0))
    speed, error = median_with_error(rates[1:])  # the first one warms up
    if not peaks:
        return DecodingSpeed(len(prompts), speed, error, None, None)
    memory, memory_error = median_with_error(peaks[1:])
    return DecodingSpeed(len(prompts), speed, error, round(memory), memory_error)


def median_with_error(values: Sequence[float]) -> tuple[float, float]:
    """(median, its standard error by the bootstrap over the values)."""
    drawn = np.random.default_rng(0).choice(np.array(values, dtype=np.float64), (DRAWS, len(values)))
    return statistics.median(values), float(np.median(drawn, axis=1).std())


def _start_of_peak(device: torch.device) -> int | None:
    """Let the peak count anew; returns the bytes in use, or None where that cannot be done."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif not CLEAR_REFS.exists():
        return None
    else:
        give_back_freed_memory()
        try:
            CLEAR_REFS.write_text("5")  # VmHWM becomes what is resident now (man 5 proc)
        except OSError:  # some containers forbid it
            return None
    return peak_memory_bytes(device)


class StepTimes(BaseStreamer):
    """When the tokens of plain decoding came."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, value: Tensor) -> None:
        """The first one is the prompt, the second comes after it was read."""
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to show."""

    @property
    def tokens(self) -> int:
        """Written after the prompt, an end-of-text among them."""
        return len(self.moments) - 1

    def mean(self) -> float:
        """Seconds between tokens; where there is only one, what that took."""
        first = 1 if len(self.moments) > 2 else 0
        return (self.moments[-1] - self.moments[first]) / (self.tokens - first)
