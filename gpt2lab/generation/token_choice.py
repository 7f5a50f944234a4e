"""Choice of the next token from logits: the processors of each sampling method, and sampling by inverse CDF."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from gpt2lab.settings import SamplingSettings
from gpt2lab.system.determinism import has_deterministic_cumsum
from gpt2lab.system.device import widest_float


def logits_processors(sampling: SamplingSettings, padding: Tensor | None = None) -> LogitsProcessorList:
    """Return the logits processors of a method, in the order of `transformers`' generate.

    Args:
        padding: (B,) number of padding tokens at the left of each row; None: no padding.
    """
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty, prompt_ignore_length=padding))
    if sampling.no_repeat_ngram:
        processors.append(NoRepeatedNGram(sampling.no_repeat_ngram, padding))
    if sampling.is_greedy:
        return processors
    if sampling.temperature != 1:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    if sampling.typical_p < 1:
        processors.append(TypicalLogitsWarper(sampling.typical_p))
    return processors


@dataclass(frozen=True)
class TokenChoice:
    """Choice of a token from the first `vocab_size` logits.

    Attributes:
        device: where the choice is made; None: where the logits are.
        uniforms: variates (B, 1) of each sampled token; None: from the global random state.
    """

    processors: LogitsProcessorList
    vocab_size: int
    do_sample: bool
    device: torch.device | None = None
    uniforms: Iterator[Tensor] | None = None

    def scores(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Process the logits (B, V) after the tokens (B, S): (B, vocab_size)."""
        device = self.device or logits.device
        return self.processors(ids.to(device), logits[:, : self.vocab_size].to(device, torch.float32))

    def tokens(self, scores: Tensor) -> Tensor:
        """Choose tokens (B, 1) from scores (B, vocab_size)."""
        if not self.do_sample:
            return scores.argmax(1, keepdim=True)
        if self.uniforms is None:
            return scores.softmax(1).multinomial(1)
        return inverse_cdf(scores, next(self.uniforms))


def row_uniforms(row_seeds: Sequence[int], count: int) -> Tensor:
    """Return `count` uniform variates in [0, 1) of each row, (count, B, 1) in float64, each row from its own seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in row_seeds]
    rows = [torch.rand(count, 1, generator=generator, dtype=torch.float64) for generator in generators]
    return torch.stack(rows, 1)


def inverse_cdf(scores: Tensor, uniforms: Tensor) -> Tensor:
    """Return tokens (B, 1) of softmax(scores (B, V)) at these points (B, 1) of its cumulative distribution.

    Probabilities are multiples of 2^−52. Sums of integers are exact: they are the same on every device, a token of
    probability 0 is never chosen, and u < 1 is below the last sum.

    Args:
        uniforms: float64, in [0, 1).
    """
    cumulative = (scores.softmax(1) * 2.0**52).cumsum(1, dtype=torch.int64)  # (B, V)
    points = (uniforms * cumulative[:, -1:]).long()
    return torch.searchsorted(cumulative, points, right=True).clamp_max(scores.shape[1] - 1)  # the clamp is for NaN


def choice_device(device: torch.device) -> torch.device:
    """Return where tokens are chosen: `device`, or the CPU if it has no cumulative sum of floats or no float64."""
    is_able = has_deterministic_cumsum(device) and widest_float(device) == torch.float64
    return device if is_able else torch.device("cpu")


class NoRepeatedNGram(NoRepeatNGramLogitsProcessor):
    """Logits processor that bans repeated n-grams; unlike that of `transformers` it ignores padding.

    Args:
        padding: (B,) number of padding tokens at the left of each row; None: no padding.
    """

    def __init__(self, size: int, padding: Tensor | None) -> None:
        super().__init__(size)
        self.padding = padding

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Set banned tokens of the logits (B, V) after the tokens (B, S) to −inf."""
        if self.padding is not None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
            input_ids = input_ids.masked_fill(positions < self.padding[:, None], scores.shape[1])  # an unused id
        return super().__call__(input_ids, scores)
