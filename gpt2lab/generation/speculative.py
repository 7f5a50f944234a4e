"""Speculative decoding with measurements: a draft model proposes tokens, the target verifies several in one call.

The output has the target's distribution, whatever the draft model proposes: a drafted token x is accepted with
probability min(1, p(x) / q(x)), and the first rejected one is replaced by a sample from the positive part of p − q.
Greedy decoding accepts the target's argmax. Both hold up to rounding: a call on several tokens sums in another order
than a call on one, which can decide between nearly equal probabilities.

The draft length is adaptive (`DraftLength`). Its costs are estimated from the models' sizes, not timed, so that the
text for a seed does not depend on the machine's load.

The predicted speed-up is Leviathan's formula with counts and times of this run: tokens per target call ÷ (v + c ·
drafted tokens per call). c is the time of a draft step over that of a plain decoding step, both including the choice of
the token; v is the same for the target's verification call. The paper assumes v = 1, which holds if memory bandwidth
limits the call. v is 1.05 in bf16 on a CPU with bf16 products, and 1.16 in fp32 with two drafted tokens
(docs/measurements/decoding.md). Both predictions are reported; neither includes prefill, acceptance and bookkeeping.

Assisted generation in `transformers` takes 1.6 to 1.9 times as long with its defaults, and tuned no less, because it
calls the draft model's whole generate for every draft (docs/measurements/decoding.md).

Source: Leviathan, Kalman, Matias 2023, Fast Inference from Transformers via Speculative Decoding (arXiv 2211.17192).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from gpt2lab.evaluation.acceptance import MOST_DRAFTS, cost_ratio, is_accepted
from gpt2lab.generation.decoder import Decoder
from gpt2lab.generation.decoding_speed import StepTimes
from gpt2lab.generation.draft_length import DraftLength
from gpt2lab.generation.sampling import generate_ids, generation_mode, stopping_criteria
from gpt2lab.generation.token_choice import TokenChoice, logits_processors
from gpt2lab.model.backbone import shape_from_config
from gpt2lab.settings import SamplingSettings
from gpt2lab.system.device import synchronize

# Cost of verifying 1, 2, … tokens in one call, in target steps. On a CPU in fp32 the weights are packed for products of
# two rows or more (packed_products.py). Measured for small, 2 to 8 tokens: on an Intel Xeon, one thread, 1.17, 1.24,
# 1.38, 1.38, 1.47, 1.60, 1.60; on an AMD EPYC, two threads, 1.15, 0.98, 1.02, 0.92, 0.94, 0.99, 1.01. Between them:
VERIFY_COSTS_CPU = (1.0, *(1.1 + 0.04 * rows for rows in range(2, MOST_DRAFTS + 2)))
# In bf16, on a CPU with bf16 products, eight rows cost hardly more than one: 1.06, 1.05, 1.09, 1.06, 1.01, …, 1.14
# (small, two threads).
VERIFY_COSTS_CPU_BF16 = (1.0, *(1.05 + 0.01 * rows for rows in range(MOST_DRAFTS)))
VERIFY_COSTS_GPU = tuple(1 + 0.15 * more for more in range(MOST_DRAFTS + 1))


@dataclass(frozen=True)
class Round:
    """One draft and its verification: numbers of drafted, accepted and generated tokens, and the seconds of both."""

    drafted: int
    kept: int
    generated: int
    draft_seconds: float
    verify_seconds: float


@dataclass(frozen=True)
class Speculated:
    """One prompt continued with a draft model and without.

    Attributes:
        ids: tokens with the draft model.
        plain_ids: tokens without it; with greedy decoding the same up to rounding.
        tokens, plain_tokens: number of new tokens, including an end-of-text.
        calls: number of target calls, including prefill.
        drafted: number of proposed tokens.
        kept: number of accepted ones.
        seconds, plain_seconds: total times.
        cost_ratio: time of a draft step over that of a plain decoding step, both with the choice of the token; means
            without the first ones, which include prefill.
        look_ratio: time of a verification call over that of a plain decoding step.
    """

    ids: list[int]
    plain_ids: list[int]
    tokens: int
    plain_tokens: int
    calls: int
    drafted: int
    kept: int
    seconds: float
    plain_seconds: float
    cost_ratio: float
    look_ratio: float

    @property
    def tokens_per_call(self) -> float:
        """New tokens per target call."""
        return self.tokens / self.calls

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were accepted."""
        return self.kept / max(self.drafted, 1)

    @property
    def speedup(self) -> float:
        """Measured speed-up per token."""
        return (self.plain_seconds / self.plain_tokens) / (self.seconds / self.tokens)

    @property
    def predicted_speedup(self) -> float:
        """Speed-up predicted from tokens per call, draft cost and verification cost."""
        return self.tokens_per_call / (self.look_ratio + self.cost_ratio * self.drafted / self.calls)

    @property
    def predicted_with_free_looks(self) -> float:
        """Predicted speed-up ignoring verification cost (v = 1), as in the paper."""
        return self.tokens_per_call / (1 + self.cost_ratio * self.drafted / self.calls)

    def figures(self) -> dict[str, float]:
        """Return the measurements by name, for JSON."""
        return {
            "acceptance": self.acceptance,
            "tokens_per_call": self.tokens_per_call,
            "cost_ratio": self.cost_ratio,
            "look_ratio": self.look_ratio,
            "speedup": self.speedup,
            "predicted_speedup": self.predicted_speedup,
            "predicted_with_free_looks": self.predicted_with_free_looks,
            "plain_seconds": self.plain_seconds,
        }


def speculate(
    target: GPT2LMHeadModel,
    draft: GPT2LMHeadModel,
    prompt: Sequence[int],
    sampling: SamplingSettings,
    *,
    max_new_tokens: int,
    end_of_text: int,
    vocab_size: int,
    seed: int = 0,
    stop: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Speculated:
    """Continue one prompt without the draft model and with it.

    Args:
        draft: model with the target's tokenizer, on the target's device.
        vocab_size: number of tokens without padding of the vocabulary.
        stop: strings that end a completion and remain in it; requires the tokenizer.
    """
    positions = min(target.config.n_positions, draft.config.n_positions)
    if max_new_tokens >= positions:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} leaves no position for a prompt; the smaller model has {positions}. "
            "Lower max_new_tokens."
        )
    prompt = list(prompt)[max_new_tokens - positions :]  # the same for both
    steps, device = StepTimes(), target.transformer.wte.weight.device
    arguments: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "end_of_text": end_of_text,
        "vocab_size": vocab_size,
        "seed": seed,
        "stop": stop,
        "tokenizer": tokenizer,
    }
    started = time.perf_counter()
    (plain_ids,) = generate_ids(target, [prompt], sampling, streamer=steps, **arguments)
    synchronize(device)
    between = time.perf_counter()
    ids, rounds = speculative_ids(target, draft, prompt, sampling, **arguments)
    synchronize(device)
    seconds, plain_seconds = time.perf_counter() - between, between - started
    drafted = sum(one.drafted for one in rounds)
    timed = rounds[1:] or rounds  # the first round includes prefill
    step = steps.mean()
    cost = sum(one.draft_seconds for one in timed) / max(sum(one.drafted for one in timed), 1) / step
    verify = sum(one.verify_seconds for one in timed) / len(timed) / step
    tokens, kept = sum(one.generated for one in rounds), sum(one.kept for one in rounds)
    counts = (tokens, steps.tokens, len(rounds), drafted, kept)
    return Speculated(ids, plain_ids, *counts, seconds, plain_seconds, cost, verify)


def speculative_ids(
    target: GPT2LMHeadModel,
    draft: GPT2LMHeadModel,
    prompt: Sequence[int],
    sampling: SamplingSettings,
    *,
    max_new_tokens: int,
    end_of_text: int,
    vocab_size: int,
    seed: int = 0,
    streamer: BaseStreamer | None = None,
    stop: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[list[int], list[Round]]:
    """Return (new token ids up to and without `end_of_text`, rounds).

    Args:
        prompt: at most n_positions − `max_new_tokens` tokens for both models.
        streamer: receives the prompt, then the tokens of each round.
        stop: strings that end a completion and remain in it; requires the tokenizer.
    """
    device = target.transformer.wte.weight.device
    ids = torch.tensor([list(prompt) or [end_of_text]], device=device)  # (1, L)
    prompt_length, max_length = ids.shape[1], ids.shape[1] + max_new_tokens
    choice = TokenChoice(logits_processors(sampling), vocab_size, do_sample=not sampling.is_greedy)
    step_cost = cost_ratio(shape_from_config(draft.config), shape_from_config(target.config), max_length)
    length = DraftLength(step_cost, verification_costs(device, target.dtype))
    stops, ended, rounds = stopping_criteria(stop, tokenizer), False, list[Round]()
    if streamer is not None:
        streamer.put(ids.cpu())
    with generation_mode(target, draft, seed=seed):
        verifier, drafter = Decoder(target, max_length), Decoder(draft, max_length)
        while ids.shape[1] < max_length and not ended:
            started, before = time.perf_counter(), ids.shape[1]
            text, draft_scores = _draft(drafter, ids, choice, length, max_length - before - 1)
            drafted = text.shape[1] - before
            between = time.perf_counter()
            logits = verifier.read(text[:, verifier.length :], last=drafted + 1)[0]  # (drafted + 1, V)
            synchronize(device)
            verified = time.perf_counter()
            scores = _scores(choice, text, logits, sampling.uses_history)
            kept, following = accept(text[0, before:], draft_scores, scores, choice.do_sample)
            length.update(kept)
            text = torch.cat([text[:, : before + kept], following], 1)
            count, ended = _until_end(text, before, end_of_text, stops)
            ids = text[:, : before + count]
            rounds.append(Round(drafted, min(kept, count), count, between - started, verified - between))
            if streamer is not None:
                streamer.put(ids[0, before:].cpu())
            for decoder in (verifier, drafter):
                decoder.truncate(ids.shape[1] - 1)
    if streamer is not None:
        streamer.end()
    generated = ids[0, prompt_length:].tolist()
    return generated[: generated.index(end_of_text)] if end_of_text in generated else generated, rounds


def _until_end(text: Tensor, before: int, end_of_text: int, stops: StoppingCriteriaList) -> tuple[int, bool]:
    """Return (number of tokens of a text (1, S) after the first `before` up to its end, whether it has ended)."""
    for count, token in enumerate(text[0, before:].tolist(), 1):
        if token == end_of_text or (stops and stops(text[:, : before + count], text).item()):
            return count, True
    return text.shape[1] - before, False


def verification_costs(device: torch.device, dtype: torch.dtype) -> Sequence[float]:
    """Relative cost of verifying 1, 2, … tokens in one call (1.0 = one target step)."""
    if device.type != "cpu":
        return VERIFY_COSTS_GPU
    return VERIFY_COSTS_CPU_BF16 if dtype == torch.bfloat16 else VERIFY_COSTS_CPU


def accept(drafts: Tensor, draft_scores: Tensor, scores: Tensor, do_sample: bool) -> tuple[int, Tensor]:
    """Return (number of accepted drafts, token (1, 1) that follows them).

    Args:
        drafts: (K,) drafted tokens.
        draft_scores: (K, V) processed logits of the draft model.
        scores: (K + 1, V) processed logits of the target at the same positions and the next.
        do_sample: whether tokens are sampled, or the argmax.
    """
    if not do_sample:
        top = scores.argmax(1)
        kept = int((top[:-1] == drafts).cumprod(0).sum())
        return kept, top[None, kept : kept + 1]
    log_p, log_q = scores.log_softmax(1), draft_scores.log_softmax(1)
    index = drafts[:, None]
    passes = is_accepted(log_p[:-1].gather(1, index), log_q.gather(1, index), torch.rand_like(log_q[:, :1]))  # (K, 1)
    kept = int(passes.cumprod(0).sum())
    p = log_p[kept].exp()  # (V,)
    if kept < len(drafts):
        residual = (p - log_q[kept].exp()).clamp_min(0)
        p = residual if residual.any() else p  # zero if both distributions are equal up to rounding
    return kept, p.multinomial(1)[None]


def _draft(drafter: Decoder, ids: Tensor, choice: TokenChoice, length: DraftLength, most: int) -> tuple[Tensor, Tensor]:
    """Return (text (1, S) with up to `most` drafted tokens, their scores (K, V))."""
    rows = [torch.empty(0, choice.vocab_size, device=ids.device)]
    for number in range(1, min(most, MOST_DRAFTS) + 1):
        scores = choice.scores(ids, drafter.read(ids[:, drafter.length :])[:, -1])  # (1, V)
        ids = torch.cat([ids, choice.tokens(scores)], 1)
        rows.append(scores)
        largest = (scores.amax(1) - scores.logsumexp(1)).exp().item()
        if not length.should_continue(largest) or number == most:
            break
    return ids, torch.cat(rows)


def _scores(choice: TokenChoice, text: Tensor, logits: Tensor, uses_history: bool) -> Tensor:
    """Process the target's logits (K + 1, V) at the last K tokens of the text and the one before them."""
    if not uses_history:
        return choice.scores(text.expand(len(logits), -1), logits)
    before = text.shape[1] - len(logits) + 1
    rows = [choice.scores(text[:, : before + number], row[None]) for number, row in enumerate(logits)]
    return torch.cat(rows)
