"""Decoding speed: tokens per second and memory of greedy decoding."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel
from transformers.generation.streamers import BaseStreamer

from gpt2lab.generation.sampling import generate_ids
from gpt2lab.settings import GREEDY
from gpt2lab.system.device import peak_memory_bytes, reset_peak_memory, synchronize
from gpt2lab.system.malloc_tuning import release_freed_memory

ROUNDS, RESAMPLES = 5, 1000


@dataclass(frozen=True)
class DecodingSpeed:
    """Medians over the rounds of greedy decoding, with bootstrap standard errors of the medians.

    Attributes:
        batch: number of texts generated together.
        tokens_per_second: of the whole batch.
        memory_bytes: weights plus peak of decoding; None if it cannot be measured.
    """

    batch: int
    tokens_per_second: float
    standard_error: float
    memory_bytes: int | None
    memory_standard_error: float | None


def measure_decoding_speed(
    model: GPT2LMHeadModel, prompts: Sequence[Sequence[int]], *, tokens: int, end_of_text: int, vocab_size: int
) -> DecodingSpeed:
    """Measure the continuation of a batch of prompts; one warm-up round, then 5 rounds.

    Args:
        tokens: maximum number of new tokens per prompt.
        vocab_size: number of tokens without padding of the vocabulary.
    """
    device, weights = model.device, sum(parameter.nbytes for parameter in model.parameters())
    rates, peaks = [], []
    for _ in range(ROUNDS + 1):
        before = _reset_peak(device)
        synchronize(device)
        started = time.perf_counter()
        texts = generate_ids(
            model, prompts, GREEDY, max_new_tokens=tokens, end_of_text=end_of_text, vocab_size=vocab_size
        )
        synchronize(device)
        generated = sum(min(len(text) + 1, tokens) for text in texts)
        rates.append(generated / (time.perf_counter() - started))
        if before is not None:
            peaks.append(weights + max(peak_memory_bytes(device) - before, 0))
    speed, error = median_with_error(rates[1:])  # without the warm-up round
    if not peaks:
        return DecodingSpeed(len(prompts), speed, error, None, None)
    memory, memory_error = median_with_error(peaks[1:])
    return DecodingSpeed(len(prompts), speed, error, round(memory), memory_error)


def median_with_error(values: Sequence[float]) -> tuple[float, float]:
    """Return (median, its bootstrap standard error)."""
    resampled = np.random.default_rng(0).choice(np.array(values, dtype=np.float64), (RESAMPLES, len(values)))
    return statistics.median(values), float(np.median(resampled, axis=1).std())


def _reset_peak(device: torch.device) -> int | None:
    """Reset the peak memory counter; return the bytes in use, or None if it cannot be reset."""
    if device.type == "cpu":
        release_freed_memory()
    try:
        return reset_peak_memory(device)
    except OSError:
        return None


class StepTimes(BaseStreamer):
    """Streamer that records the times of the tokens of plain decoding."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Record the time of the prompt, then of each token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing."""

    @property
    def tokens(self) -> int:
        """Number of new tokens, including an end-of-text."""
        return len(self.times) - 1

    def mean(self) -> float:
        """Mean seconds between tokens; with a single token the seconds since the prompt."""
        first = 1 if len(self.times) > 2 else 0
        return (self.times[-1] - self.times[first]) / (self.tokens - first)
