"""Inspection: attention weights and next-token predictions of a GPT-2 on one text.

Shapes: T positions, S of them shown (the last ones), N predicted tokens, L layers, H heads, D hidden width,
V vocabulary.

With the model's distribution q at a position, and the token y there:
    loss       −log q_y, in nats
    rank       1 + number of tokens with a higher probability than y
    entropy    −Σ q log q, in nats
and with a teacher's distribution p:
    KL         Σ p (log p − log q), in nats
    TVD        ½ Σ |p − q|, from 0 (the same) to 1 (nothing in common)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from gpt2lab.data.batch import IGNORE_INDEX, Batch
from gpt2lab.losses.divergences import finite
from gpt2lab.losses.logit_chunks import logit_chunks
from gpt2lab.model.attention_masks import document_bounds, format_mask, make_spans, spans_to_mask, spans_to_position_ids
from gpt2lab.reports.head_summary import habits
from gpt2lab.settings import OBJECTIVES

TOP = 5
CHUNK_ROWS = 64  # positions whose logits exist at a time
LONGEST_STRIP = 512  # tokens with shown metrics
LONGEST_MAP = 192  # tokens with shown attention; fewer with many layers and heads:
LARGEST_MAPS = 6_000_000  # total attention weights, one byte each in the page


@dataclass(frozen=True)
class Reading:
    """A text as input of a model.

    Attributes:
        ids: (T,) input tokens, for mlm with mask tokens.
        labels: (T,) target of each position, or IGNORE_INDEX.
        spans: (1, T, 2) attention spans (gpt2lab/model/attention_masks.py).
        fills: whether the target is the masked token at the position (mlm) instead of the next one.
        written: (T,) whether the model generated the token.
    """

    ids: list[int]
    labels: list[int]
    spans: Tensor
    fills: bool
    written: list[bool]

    @property
    def text(self) -> list[int]:
        """Tokens (T,), with masked ones filled in."""
        if not self.fills:
            return self.ids
        return [token if label == IGNORE_INDEX else label for token, label in zip(self.ids, self.labels, strict=True)]


def reading_of_text(
    prompt: Sequence[int], following: Sequence[int], objective: str, *, written: bool, max_tokens: int
) -> Reading:
    """Build the reading of a prompt and its continuation, truncated to the last `max_tokens` tokens.

    For prefix_lm, attention within the prompt except its last token is bidirectional and has no targets.

    Args:
        written: whether the model generated the continuation.
        max_tokens: maximum number of tokens.
    """
    ids = [*prompt, *following][-max_tokens:]
    prompt_length = max(len(ids) - len(following), 0)
    prefix_end = max(prompt_length - 1, 0) if OBJECTIVES[objective].bidirectional_prompt else 0
    labels = [*ids[1:], IGNORE_INDEX]
    labels[:prefix_end] = [IGNORE_INDEX] * prefix_end
    is_written = [written and position >= prompt_length for position in range(len(ids))]
    return Reading(ids, labels, _one_document(len(ids), prefix_end), False, is_written)


def reading_of_gaps(prompt: Sequence[int], filled: Sequence[int], mask: int) -> Reading:
    """Build the reading of an mlm prompt with its filled gaps; attention is bidirectional.

    Args:
        filled: the prompt's last tokens with filled gaps, from `gpt2lab.generation.completion.fill_masks`.
        mask: id of the mask token.
    """
    ids = list(prompt)[-len(filled) :]
    gaps = [token == mask for token in ids]
    labels = [new if gap else IGNORE_INDEX for gap, new in zip(gaps, filled, strict=True)]
    return Reading(ids, labels, _one_document(len(ids), len(ids)), True, gaps)


def reading_of_batch(batch: Batch, objective: str, tokens: int) -> Reading:
    """Build the reading of the beginning of a batch's first sequence, without padding.

    Args:
        tokens: length; more if the targets begin in its second half or later.
    """
    targets = (batch.labels[0] != IGNORE_INDEX).nonzero().flatten().tolist()
    fills = OBJECTIVES[objective].fills_masks
    length = min(len(batch.labels[0]), tokens)
    if targets and not fills:
        length = min(targets[-1] + 1, max(targets[0] + tokens // 2, tokens))
    labels = batch.labels[0, :length].tolist()
    if not fills:
        labels[-1] = IGNORE_INDEX  # the next token is not part of the reading
    spans = _one_document(length) if batch.spans is None else batch.spans[:1, :length].clamp(max=length).cpu()
    return Reading(batch.input_ids[0, :length].tolist(), labels, spans, fills, [False] * length)


def _one_document(length: int, prefix_end: int = 0) -> Tensor:
    starts = torch.zeros(1, length, dtype=torch.bool)
    return make_spans(*document_bounds(starts), prefix_end)


@dataclass
class Expectations:
    """A model's predictions at each predicted token, (N,) each."""

    losses: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    top_tokens: list[list[tuple[int, float]]] = field(default_factory=list)  # top-5 tokens and their probabilities

    def add(self, log_q: Tensor, labels: Tensor) -> None:
        """Append the metrics of log-probabilities (C, V) and the tokens there (C,)."""
        of_label = log_q.gather(1, labels[:, None])  # (C, 1)
        values, tokens = log_q.topk(min(TOP, log_q.shape[1]))  # (C, 5)
        self.losses += (-of_label[:, 0]).tolist()
        self.ranks += (1 + (log_q > of_label).sum(1)).tolist()
        self.entropies += (-(log_q.exp() * finite(log_q)).sum(1)).tolist()
        self.top_tokens += [
            list(zip(row, probabilities, strict=True))
            for row, probabilities in zip(tokens.tolist(), values.exp().tolist(), strict=True)
        ]


@dataclass
class Disagreement:
    """A teacher's predictions and their differences to the model's, (N,) each."""

    expectations: Expectations = field(default_factory=Expectations)
    kl: list[float] = field(default_factory=list)
    tvd: list[float] = field(default_factory=list)

    def add(self, log_p: Tensor, log_q: Tensor, labels: Tensor) -> None:
        """Append the metrics of log-probabilities (C, V) of teacher and model and the tokens there (C,)."""
        self.expectations.add(log_p, labels)
        p, q = log_p.exp(), log_q.exp()
        difference = finite(log_p) - finite(log_q)
        self.kl += (p * difference).sum(1).tolist()
        self.tvd += ((p - q).abs().sum(1) / 2).tolist()


@dataclass(frozen=True)
class Inspection:
    """Results of an inspection.

    Attributes:
        attention: (L, H, S, S) fp32 attention weights of the last S tokens: query (third axis), key (fourth). A row
            sums to 1, or less if earlier tokens are attended to, too. Masked weights are exactly 0.
        habits: (L · H,) summary of each head, over all T tokens.
        positions: (N,) positions of the predicted tokens in the text, ascending.
    """

    reading: Reading
    attention: Tensor
    habits: list[str]
    positions: list[int]
    expectations: Expectations
    disagreement: Disagreement | None


def tokens_shown(layers: int, heads: int, length: int) -> int:
    """Number of tokens, the last ones, with shown attention."""
    return max(min(LONGEST_MAP, length, int((LARGEST_MAPS / (layers * heads)) ** 0.5)), 1)


@torch.no_grad()
def inspect_reading(
    model: GPT2LMHeadModel,
    reading: Reading,
    vocab_size: int,
    teacher: GPT2LMHeadModel | None = None,
    most: int = LONGEST_MAP,
) -> Inspection:
    """Run a model, and a teacher with the same tokenizer, on a text. Both are unchanged; no random numbers are used.

    Args:
        vocab_size: number of tokens without padding of the vocabulary.
        most: maximum number of tokens, the last ones, with stored attention.
    """
    shape = model.config
    shown = tokens_shown(shape.n_layer, shape.n_head, min(most, len(reading.ids)))
    with _record_attention(model, reading.spans, shown) as (maps, summaries):
        hidden = hidden_states(model, reading)
    sources = [position for position, label in enumerate(reading.labels) if label != IGNORE_INDEX]
    labels = torch.tensor([reading.labels[position] for position in sources], dtype=torch.int64)  # (N,)
    of_model = _log_probabilities(model, hidden[sources], vocab_size)
    expectations, disagreement = Expectations(), None
    if teacher is None:
        for log_q, some in zip(of_model, labels.split(CHUNK_ROWS), strict=True):
            expectations.add(log_q, some)
    else:
        disagreement = Disagreement()
        of_teacher = _log_probabilities(teacher, hidden_states(teacher, reading)[sources], vocab_size)
        for log_p, log_q, some in zip(of_teacher, of_model, labels.split(CHUNK_ROWS), strict=True):
            expectations.add(log_q, some)
            disagreement.add(log_p, log_q, some)
    positions = sources if reading.fills else [position + 1 for position in sources]
    return Inspection(reading, torch.stack(maps), summaries, positions, expectations, disagreement)


def hidden_states(model: GPT2LMHeadModel, reading: Reading) -> Tensor:
    """Return the last hidden states (T, D), with eager attention and without dropout."""
    weight = model.transformer.wte.weight
    ids, spans = torch.tensor([reading.ids], device=weight.device), reading.spans.to(weight.device)
    mask = format_mask(spans_to_mask(spans), "eager", weight.dtype)
    with _eager(model), torch.compiler.set_stance("force_eager"):  # each length would be compiled
        out = model.transformer(ids, attention_mask=mask, position_ids=spans_to_position_ids(spans), use_cache=False)
    return out.last_hidden_state[0]


@contextmanager
def _eager(model: GPT2LMHeadModel) -> Iterator[None]:
    """Use eager attention, which returns its weights, and eval mode in this context."""
    implementation, was_training = model.config._attn_implementation, model.training
    model.config._attn_implementation = "eager"
    model.eval()
    try:
        yield
    finally:
        model.config._attn_implementation = implementation
        model.train(was_training)


@contextmanager
def _record_attention(model: GPT2LMHeadModel, spans: Tensor, shown: int) -> Iterator[tuple[list[Tensor], list[str]]]:
    """Record each layer's weights (H, S, S) and head summaries during a forward pass.

    A hook per layer reduces them at once, because the full weights of all layers do not fit in memory for a long text.
    """
    maps: list[Tensor] = []
    summaries: list[str] = []

    def keep(module: nn.Module, given: Any, output: tuple[Tensor, Tensor]) -> None:
        weights = output[1][0].float()  # (H, T, T)
        maps.append(weights[:, -shown:, -shown:].cpu())
        summaries.extend(habits(weights, spans[0].to(weights.device)))

    hooks = [block.attn.register_forward_hook(keep) for block in model.transformer.h]
    try:
        yield maps, summaries
    finally:
        for hook in hooks:
            hook.remove()


def _log_probabilities(model: GPT2LMHeadModel, hidden: Tensor, vocab_size: int) -> Iterator[Tensor]:
    """Yield the log-probabilities (C, V) of chunks of hidden states (N, D), in fp32 on the CPU."""
    weight = model.transformer.wte.weight[:vocab_size]
    for _, logits in logit_chunks(hidden, weight, rows=CHUNK_ROWS, dtype=torch.float32):
        yield logits.log_softmax(1).cpu()


def nearest(weight: Tensor, ids: Sequence[int], vocab_size: int, count: int) -> list[list[tuple[int, float]]]:
    """Return the nearest other tokens of each token by cosine similarity of the embeddings, with the cosines.

    Args:
        weight: (V, D) embeddings.
        count: number of neighbours.
    """
    directions = torch.nn.functional.normalize(weight[:vocab_size].detach().float(), dim=1)  # (V, D)
    own = torch.tensor(list(ids), device=weight.device)
    cosines = directions[own] @ directions.T  # (len(ids), V)
    cosines.scatter_(1, own[:, None], -torch.inf)
    values, found = cosines.topk(min(count, vocab_size - 1))
    return [list(zip(row, near, strict=True)) for row, near in zip(found.tolist(), values.tolist(), strict=True)]
