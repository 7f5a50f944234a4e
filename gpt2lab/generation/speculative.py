"""Speculative decoding, measured: a draft model proposes tokens, the target looks at several in one call.

What comes out is distributed as the target alone would write, for whatever the draft proposes: a draft x is kept with
probability min(1, p(x) / q(x)), and the first that is not is replaced by a draw from the positive part of p − q. Greedy
decoding keeps what the target itself would choose. Both are so up to rounding: looking at several tokens in one call
adds numbers in another order than looking at one, which can decide between tokens that are as good as equally likely.

How long a draft is: it goes on while more tokens are expected to bring more for their cost than the draft has brought
so far, the target's own token and its cost included (`DraftLength`). Expected is what came of earlier drafts of which
the draft model was as sure. Costs in this decision are estimates from the models' sizes, not times, lest the text
depend on the machine's load: with the same seed it is the same.

What the speed-up should be is Leviathan's formula with what was counted and timed in this very run: tokens for each of
the target's calls ÷ (v + c · drafts for each call). c is the time of a draft's step, choosing a token included, over
that of a step of plain decoding; v is the same of the target's call that looks at a draft and one token more. The paper
takes v as 1, which holds where reading the weights takes longer than computing with them. In bf16 it nearly does on a
CPU that multiplies bf16 (1.05), in fp32 less so: 1.16 with two drafts (docs/tasks.md). Both predictions are reported.
Reading the prompt, accepting and bookkeeping are in neither.

The loop is our own: assisted generation in `transformers` calls the draft model's whole generate for every draft, which
takes 1.6 to 1.9 times as long with its defaults, and tuned no less (docs/tasks.md; benchmarks/benchmark_decoding.py).

Source: Leviathan, Kalman, Matias 2023, Fast Inference from Transformers via Speculative Decoding (arXiv 2211.17192).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from gpt2lab.evaluation.acceptance import MOST_DRAFTS, cost_ratio, is_kept
from gpt2lab.generation.decoder import Decoder
from gpt2lab.generation.decoding_speed import StepTimes
from gpt2lab.generation.draft_length import DraftLength
from gpt2lab.generation.sampling import Choice, Sampling, generate_ids, stopping, writing
from gpt2lab.model.backbone import shape_of
from gpt2lab.system.device import synchronize

# Cost of a target's look at 1, 2, … tokens, in its steps. On a CPU a product of matrices costs little more with two or
# three rows than with one, and with four it costs twice as much, since then the weights are copied first: model small
# on one thread 1.12, 1.21, 1.96, 2.03, 2.14, 2.44, … (mini, distil alike; micro, which caches hold, 1.06, 1.14, 1.42).
LOOKS_ON_CPU = (1.0, 1.1, 1.2, *(1.5 + 0.13 * rows for rows in range(4, MOST_DRAFTS + 2)))
# In bf16, on a CPU that multiplies it, a product with eight rows takes hardly longer than with one: 1.06, 1.05, 1.09,
# 1.06, 1.01, …, 1.14 (small, two threads).
LOOKS_ON_CPU_BF16 = (1.0, *(1.05 + 0.01 * rows for rows in range(MOST_DRAFTS)))
LOOKS_ELSEWHERE = tuple(1 + 0.15 * more for more in range(MOST_DRAFTS + 1))


@dataclass(frozen=True)
class Round:
    """One draft and the target's look at it: how many tokens were drafted, kept of these, and written in all.

    Seconds are those of drawing up the draft and of the target's call.
    """

    drafted: int
    kept: int
    written: int
    draft_seconds: float
    look_seconds: float


@dataclass(frozen=True)
class Speculated:
    """One prompt continued twice, with a draft model and without.

    Attributes:
        ids: what was written with it.
        plain_ids: what was written without it; the same where decoding is greedy, but for rounding.
        tokens, plain_tokens: written, an end-of-text among them.
        calls: of the target, the first one, which reads the prompt, among them.
        drafted: tokens that were proposed.
        kept: of these.
        seconds, plain_seconds: of the two.
        cost_ratio: time of a draft's step over that of a step of plain decoding, choosing a token included; means
            without the first ones, which read the prompt.
        look_ratio: time of a target's call that looks at a draft over that of a step of plain decoding.
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
        """New tokens for each of the target's calls."""
        return self.tokens / self.calls

    @property
    def acceptance(self) -> float:
        """Share of the proposed tokens that were kept."""
        return self.kept / max(self.drafted, 1)

    @property
    def speedup(self) -> float:
        """Measured, per token."""
        return (self.plain_seconds / self.plain_tokens) / (self.seconds / self.tokens)

    @property
    def predicted_speedup(self) -> float:
        """What tokens per call imply, with what a draft and a look at it cost."""
        return self.tokens_per_call / (self.look_ratio + self.cost_ratio * self.drafted / self.calls)

    @property
    def predicted_with_free_looks(self) -> float:
        """The same where a look at several tokens costs what one on one token does, as the paper has it."""
        return self.tokens_per_call / (1 + self.cost_ratio * self.drafted / self.calls)

    def figures(self) -> dict[str, float]:
        """By name, for JSON."""
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
    sampling: Sampling,
    *,
    max_new_tokens: int,
    end_of_text: int,
    entries: int,
    seed: int = 0,
    stop: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Speculated:
    """Continue one prompt without the draft model and with it.

    Args:
        draft: with the target's tokens, on the target's device.
        entries: of the vocabulary that mean a token.
        stop: texts that end a completion, which holds them; needs the tokenizer.
    """
    room = min(target.config.n_positions, draft.config.n_positions) - max_new_tokens
    if room < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} leaves no room in the positions of both models.")
    prompt = list(prompt)[-room:]  # the same for both
    steps, device = StepTimes(), target.transformer.wte.weight.device
    started = time.perf_counter()
    (plain_ids,) = generate_ids(
        target,
        [prompt],
        sampling,
        max_new_tokens=max_new_tokens,
        end_of_text=end_of_text,
        entries=entries,
        seed=seed,
        streamer=steps,
        stop=stop,
        tokenizer=tokenizer,
    )
    synchronize(device)
    between = time.perf_counter()
    ids, rounds = speculative_ids(
        target,
        draft,
        prompt,
        sampling,
        max_new_tokens=max_new_tokens,
        end_of_text=end_of_text,
        entries=entries,
        seed=seed,
        stop=stop,
        tokenizer=tokenizer,
    )
    synchronize(device)
    seconds, plain_seconds = time.perf_counter() - between, between - started
    drafted = sum(one.drafted for one in rounds)
    settled = rounds[1:] or rounds
    step = steps.mean()
    cost = sum(one.draft_seconds for one in settled) / max(sum(one.drafted for one in settled), 1) / step
    look = sum(one.look_seconds for one in settled) / len(settled) / step
    tokens, kept = sum(one.written for one in rounds), sum(one.kept for one in rounds)
    counts = (tokens, steps.tokens, len(rounds), drafted, kept)
    return Speculated(ids, plain_ids, *counts, seconds, plain_seconds, cost, look)


@torch.inference_mode()
def speculative_ids(
    target: GPT2LMHeadModel,
    draft: GPT2LMHeadModel,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    end_of_text: int,
    entries: int,
    seed: int = 0,
    streamer: BaseStreamer | None = None,
    stop: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[list[int], list[Round]]:
    """New token ids after the prompt, up to and without `end_of_text`, and how they came about.

    Args:
        prompt: with room for `max_new_tokens` in the positions of both models.
        streamer: is given the prompt, then what each of the target's calls has settled.
        stop: texts that end a completion, which holds them; needs the tokenizer.
    """
    device = target.transformer.wte.weight.device
    ids = torch.tensor([list(prompt) or [end_of_text]], device=device)  # (1, L)
    given, whole = ids.shape[1], ids.shape[1] + max_new_tokens
    choice = Choice(sampling.processors(), entries, draws=not sampling.is_greedy)
    step_cost = cost_ratio(shape_of(draft.config), shape_of(target.config), whole)
    length = DraftLength(step_cost, look_costs(device, target.dtype))
    stops, ended, rounds = stopping(stop, tokenizer), False, list[Round]()
    if streamer is not None:
        streamer.put(ids.cpu())
    with writing(target, draft, seed=seed):
        reader, drafter = Decoder(target, whole), Decoder(draft, whole)
        while ids.shape[1] < whole and not ended:
            started, before = time.perf_counter(), ids.shape[1]
            text, draft_scores = _draft(drafter, ids, choice, length, whole - before - 1)
            drafted = text.shape[1] - before
            between = time.perf_counter()
            logits = reader.read(text[:, reader.length :], last=drafted + 1)[0]  # (drafted + 1, V)
            synchronize(device)
            looked = time.perf_counter()
            scores = _scores(choice, text, logits, sampling.looks_back)
            kept, following = accept(text[0, before:], draft_scores, scores, choice.draws)
            length.learn(kept)
            settled = torch.cat([text[:, : before + kept], following], 1)
            count, ended = _until_end(settled, before, end_of_text, stops)
            ids = settled[:, : before + count]
            rounds.append(Round(drafted, min(kept, count), count, between - started, looked - between))
            if streamer is not None:
                streamer.put(ids[0, before:].cpu())
            for decoder in (reader, drafter):
                decoder.forget(ids.shape[1] - 1)
    if streamer is not None:
        streamer.end()
    written = ids[0, given:].tolist()
    return written[: written.index(end_of_text)] if end_of_text in written else written, rounds


def _until_end(text: Tensor, before: int, end_of_text: int, stops: StoppingCriteriaList) -> tuple[int, bool]:
    """How many tokens after the first `before` of a text (1, S) belong to it, and whether the last of these ends it."""
    for count, token in enumerate(text[0, before:].tolist(), 1):
        if token == end_of_text or (stops and stops(text[:, : before + count], text).item()):
            return count, True
    return text.shape[1] - before, False


def look_costs(device: torch.device, dtype: torch.dtype) -> Sequence[float]:
    """Of a look at 1, 2, … tokens, in steps of the target."""
    if device.type != "cpu":
        return LOOKS_ELSEWHERE
    return LOOKS_ON_CPU_BF16 if dtype == torch.bfloat16 else LOOKS_ON_CPU


def accept(drafts: Tensor, draft_scores: Tensor, scores: Tensor, draws: bool) -> tuple[int, Tensor]:
    """How many drafts (K,) are kept, and the token (1, 1) that follows them.

    Args:
        draft_scores: (K, V) logits that the drafts were chosen from.
        scores: (K + 1, V) the target's at the same places and the next.
        draws: whether tokens are drawn, or are the likeliest.
    """
    if not draws:
        likeliest = scores.argmax(1)
        kept = int((likeliest[:-1] == drafts).cumprod(0).sum())
        return kept, likeliest[None, kept : kept + 1]
    log_p, log_q = scores.log_softmax(1), draft_scores.log_softmax(1)
    places = drafts[:, None]
    passes = is_kept(log_p[:-1].gather(1, places), log_q.gather(1, places), torch.rand_like(log_q[:, :1]))  # (K, 1)
    kept = int(passes.cumprod(0).sum())
    rest = log_p[kept].exp()  # (V,)
    if kept < len(drafts):
        missing = (rest - log_q[kept].exp()).clamp_min(0)
        rest = missing if missing.any() else rest  # nothing is missing where both are equal but for rounding
    return kept, rest.multinomial(1)[None]


def _draft(drafter: Decoder, ids: Tensor, choice: Choice, length: DraftLength, most: int) -> tuple[Tensor, Tensor]:
    """The text (1, S) with up to `most` tokens after it, and the scores (K, V) that these were chosen from."""
    rows = [torch.empty(0, choice.entries, device=ids.device)]
    for number in range(1, min(most, MOST_DRAFTS) + 1):
        scores = choice.scores(ids, drafter.read(ids[:, drafter.length :])[:, -1])  # (1, V)
        ids = torch.cat([ids, choice.tokens(scores)], 1)
        rows.append(scores)
        largest = (scores.amax(1) - scores.logsumexp(1)).exp().item()
        if not length.goes_on(largest) or number == most:
            break
    return ids, torch.cat(rows)


def _scores(choice: Choice, text: Tensor, logits: Tensor, looks_back: bool) -> Tensor:
    """The target's scores (K + 1, V) from its logits after each of the last K tokens and the one before them."""
    if not looks_back:
        return choice.scores(text.expand(len(logits), -1), logits)
    before = text.shape[1] - len(logits) + 1
    rows = [choice.scores(text[:, : before + number], row[None]) for number, row in enumerate(logits)]
    return torch.cat(rows)
