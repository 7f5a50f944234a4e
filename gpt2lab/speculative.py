"""Speculative decoding, measured: a draft model proposes tokens, the target looks at several in one call.

What comes out is distributed as the target alone would write (Leviathan et al. 2023, arXiv 2211.17192). The decoding
is `transformers`' assisted generation, which ends a draft where the draft model is unsure and learns from what is
accepted how sure it should be; here it is run beside plain decoding, and calls are counted and timed.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from transformers import GPT2LMHeadModel

from gpt2lab.device import synchronize
from gpt2lab.generation import Sampling, generate_ids


@dataclass(frozen=True)
class Speculated:
    """One prompt continued twice, with a draft model and without.

    Attributes:
        ids: what was written with it.
        plain_ids: what was written without it; the same where decoding is greedy.
        tokens, plain_tokens: written, an end-of-text among them.
        calls: of the target, the first one, which reads the prompt, among them.
        drafted: tokens that were proposed.
        seconds, plain_seconds: of the two.
        cost_ratio: median time of a draft's step over that of a target's step on one token.
    """

    ids: list[int]
    plain_ids: list[int]
    tokens: int
    plain_tokens: int
    calls: int
    drafted: int
    seconds: float
    plain_seconds: float
    cost_ratio: float

    @property
    def tokens_per_call(self) -> float:
        """New tokens for each of the target's calls."""
        return self.tokens / self.calls

    @property
    def acceptance(self) -> float:
        """Share of the proposed tokens that were kept: every call adds one token of the target's own."""
        return max(self.tokens - self.calls, 0) / max(self.drafted, 1)

    @property
    def speedup(self) -> float:
        """Measured, per token."""
        return (self.plain_seconds / self.plain_tokens) / (self.seconds / self.tokens)

    @property
    def predicted_speedup(self) -> float:
        """What tokens per call and the cost ratio imply: a call that looks at several tokens counted as one on one."""
        return self.tokens_per_call / (1 + self.cost_ratio * self.drafted / self.calls)

    def figures(self) -> dict[str, float]:
        """By name, for JSON."""
        return {
            "acceptance": self.acceptance,
            "tokens_per_call": self.tokens_per_call,
            "cost_ratio": self.cost_ratio,
            "speedup": self.speedup,
            "predicted_speedup": self.predicted_speedup,
            "plain_seconds": self.plain_seconds,
        }


def speculate(
    target: GPT2LMHeadModel,
    draft: GPT2LMHeadModel,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    end_of_text: int,
    entries: int,
    seed: int = 0,
) -> Speculated:
    """Continue one prompt without the draft model and with it.

    Args:
        draft: with the target's tokens, on the target's device.
        entries: of the vocabulary that mean a token.
    """

    def written(assistant: GPT2LMHeadModel | None) -> tuple[list[int], float]:
        started = time.perf_counter()
        (ids,) = generate_ids(
            target,
            [prompt],
            sampling,
            max_new_tokens=max_new_tokens,
            end_of_text=end_of_text,
            entries=entries,
            seed=seed,
            assistant=assistant,
        )
        return ids, time.perf_counter() - started

    with Calls(target) as plain_calls:
        plain_ids, plain_seconds = written(None)
    with Calls(target) as calls, Calls(draft) as drafts:
        ids, seconds = written(draft)
    ratio = drafts.median() / plain_calls.median()
    tokens, plain_tokens = (len(one) + (len(one) < max_new_tokens) for one in (ids, plain_ids))
    counts = (len(calls.seconds), len(drafts.seconds))
    return Speculated(ids, plain_ids, tokens, plain_tokens, *counts, seconds, plain_seconds, ratio)


class Calls:
    """In this context the forward calls of a model are timed."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        self.model = model
        self.seconds: list[float] = []
        self._started = 0.0

    def __enter__(self) -> "Calls":
        self._hooks = [
            self.model.register_forward_pre_hook(self._begin),
            self.model.register_forward_hook(self._end),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def median(self) -> float:
        """Of all calls; the first ones, which read prompts, are few."""
        return statistics.median(self.seconds)

    def _begin(self, *_: object) -> None:
        self._started = time.perf_counter()

    def _end(self, *_: object) -> None:
        synchronize(self.model.device)
        self.seconds.append(time.perf_counter() - self._started)
