"""Inspection: what goes on in a GPT-2 while it reads one text — attention, and at every token what it expected.

Shapes: T positions read, S of them shown (the last ones), N predicted tokens, L layers, H heads, D hidden width,
V vocabulary.

With q the model's probabilities of what may stand at a place, and y what does:
    loss       −log q_y, in nats
    rank       1 + the number of entries that are likelier than y
    entropy    −Σ q log q, in nats
and with p those of a teacher that reads the same:
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
from gpt2lab.model.attention_masks import as_mask, document_bounds, positions_of, spans_of, visible
from gpt2lab.reports.head_summary import habits
from gpt2lab.settings import OBJECTIVES

LIKELIEST = 5
ROWS_OF_A_CHUNK = 64  # of which logits exist at a time
LONGEST_STRIP = 512  # tokens whose figures are shown
LONGEST_MAP = 192  # tokens whose attention is shown, and fewer where layers and heads are many:
LARGEST_MAPS = 6_000_000  # weights in all, a byte each in the page


@dataclass(frozen=True)
class Reading:
    """A text as a model reads it.

    Attributes:
        ids: (T,) tokens; hidden ones of mlm are its mask.
        labels: (T,) what each position predicts, or IGNORE_INDEX.
        spans: (1, T, 2) what each position sees (gpt2lab/model/attention_masks.py).
        fills: whether a position predicts the token that is hidden there (mlm) and not the one after it.
        written: (T,) whether the model itself wrote the token.
    """

    ids: list[int]
    labels: list[int]
    spans: Tensor
    fills: bool
    written: list[bool]

    @property
    def text(self) -> list[int]:
        """(T,) the tokens, hidden ones filled in."""
        if not self.fills:
            return self.ids
        return [token if label == IGNORE_INDEX else label for token, label in zip(self.ids, self.labels, strict=True)]


def reading_of_text(
    prompt: Sequence[int], following: Sequence[int], objective: str, *, written: bool, room: int
) -> Reading:
    """A prompt and what follows it, as a model of this objective reads them; of both the last `room` tokens.

    Under prefix_lm the tokens of the prompt, but for its last, see each other both ways and predict nothing.

    Args:
        written: whether the model wrote what follows.
    """
    ids = [*prompt, *following][-room:]
    given = max(len(ids) - len(following), 0)
    both_ways = max(given - 1, 0) if OBJECTIVES[objective].bidirectional_prompt else 0
    labels = [*ids[1:], IGNORE_INDEX]
    labels[:both_ways] = [IGNORE_INDEX] * both_ways
    marks = [written and place >= given for place in range(len(ids))]
    return Reading(ids, labels, _one_document(len(ids), both_ways), False, marks)


def reading_of_gaps(prompt: Sequence[int], filled: Sequence[int], mask: int) -> Reading:
    """A prompt of objective mlm, with its gaps, and what the model put in them: every token sees all others.

    Args:
        filled: the prompt's last tokens without gaps, as `gpt2lab.generation.completion.filled` gives them.
        mask: token id of a gap.
    """
    ids = list(prompt)[-len(filled) :]
    gaps = [token == mask for token in ids]
    labels = [new if gap else IGNORE_INDEX for gap, new in zip(gaps, filled, strict=True)]
    return Reading(ids, labels, _one_document(len(ids), len(ids)), True, gaps)


def reading_of_batch(batch: Batch, objective: str, tokens: int) -> Reading:
    """The beginning of a batch's first sequence, as it is trained on, without its padding.

    Args:
        tokens: how many; more where the first half of so many would not reach the tokens that are predicted.
    """
    targets = (batch.labels[0] != IGNORE_INDEX).nonzero().flatten().tolist()
    fills = OBJECTIVES[objective].fills_masks
    length = min(len(batch.labels[0]), tokens)
    if targets and not fills:
        length = min(targets[-1] + 1, max(targets[0] + tokens // 2, tokens))
    labels = batch.labels[0, :length].tolist()
    if not fills:
        labels[-1] = IGNORE_INDEX  # its token is not among those read
    spans = _one_document(length) if batch.spans is None else batch.spans[:1, :length].clamp(max=length).cpu()
    return Reading(batch.input_ids[0, :length].tolist(), labels, spans, fills, [False] * length)


def _one_document(length: int, both_ways: int = 0) -> Tensor:
    starts = torch.zeros(1, length, dtype=torch.bool)
    return spans_of(*document_bounds(starts), both_ways)


@dataclass
class Expectations:
    """What a model expected at each predicted token: (N,) each."""

    losses: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    likeliest: list[list[tuple[int, float]]] = field(default_factory=list)  # LIKELIEST entries and their probabilities

    def add(self, log_q: Tensor, labels: Tensor) -> None:
        """Take in log-probabilities (C, V) of the next C places and the tokens there (C,)."""
        of_label = log_q.gather(1, labels[:, None])  # (C, 1)
        values, entries = log_q.topk(min(LIKELIEST, log_q.shape[1]))  # (C, LIKELIEST)
        self.losses += (-of_label[:, 0]).tolist()
        self.ranks += (1 + (log_q > of_label).sum(1)).tolist()
        self.entropies += (-(log_q.exp() * finite(log_q)).sum(1)).tolist()
        self.likeliest += [
            list(zip(row, chances, strict=True))
            for row, chances in zip(entries.tolist(), values.exp().tolist(), strict=True)
        ]


@dataclass
class Disagreement:
    """A teacher beside the model: (N,) each."""

    expectations: Expectations = field(default_factory=Expectations)
    kl: list[float] = field(default_factory=list)
    tvd: list[float] = field(default_factory=list)

    def add(self, log_p: Tensor, log_q: Tensor, labels: Tensor) -> None:
        """Take in log-probabilities (C, V) of teacher and model at the next C places and the tokens there (C,)."""
        self.expectations.add(log_p, labels)
        p, q = log_p.exp(), log_q.exp()
        difference = finite(log_p) - finite(log_q)
        self.kl += (p * difference).sum(1).tolist()
        self.tvd += ((p - q).abs().sum(1) / 2).tolist()


@dataclass(frozen=True)
class Inspection:
    """What was seen.

    Attributes:
        attention: (L, H, S, S) fp32: how much each of the last S tokens (third) takes from each (fourth). A row sums to
            1, or to less where tokens before those shown are seen too. What a token does not see has exactly 0.
        habits: (L · H,) where each head mostly looks, over all T tokens.
        places: (N,) places in the text of the predicted tokens, in order.
    """

    reading: Reading
    attention: Tensor
    habits: list[str]
    places: list[int]
    expectations: Expectations
    disagreement: Disagreement | None


def tokens_shown(layers: int, heads: int, length: int) -> int:
    """Of how many tokens, the last ones, attention is shown."""
    return max(min(LONGEST_MAP, length, int((LARGEST_MAPS / (layers * heads)) ** 0.5)), 1)


@torch.no_grad()
def inspect_reading(
    model: GPT2LMHeadModel,
    reading: Reading,
    entries: int,
    teacher: GPT2LMHeadModel | None = None,
    most: int = LONGEST_MAP,
) -> Inspection:
    """Let a model, and a teacher with the same tokenizer, read a text. Both stay as they are; nothing is drawn.

    Args:
        entries: of the vocabulary that mean a token; padding is in no softmax.
        most: of how many tokens, the last ones, attention is kept.
    """
    shape = model.config
    shown = tokens_shown(shape.n_layer, shape.n_head, min(most, len(reading.ids)))
    with _kept_attention(model, reading.spans, shown) as (maps, told):
        hidden = read(model, reading)
    sources = [place for place, label in enumerate(reading.labels) if label != IGNORE_INDEX]
    labels = torch.tensor([reading.labels[place] for place in sources], dtype=torch.int64)  # (N,)
    of_model = _log_probabilities(model, hidden[sources], entries)
    expectations, disagreement = Expectations(), None
    if teacher is None:
        for log_q, some in zip(of_model, labels.split(ROWS_OF_A_CHUNK), strict=True):
            expectations.add(log_q, some)
    else:
        disagreement, said = Disagreement(), read(teacher, reading)
        of_teacher = _log_probabilities(teacher, said[sources], entries)
        for log_p, log_q, some in zip(of_teacher, of_model, labels.split(ROWS_OF_A_CHUNK), strict=True):
            expectations.add(log_q, some)
            disagreement.add(log_p, log_q, some)
    places = sources if reading.fills else [place + 1 for place in sources]
    return Inspection(reading, torch.stack(maps), told, places, expectations, disagreement)


def read(model: GPT2LMHeadModel, reading: Reading) -> Tensor:
    """Last hidden states (T, D); attention is computed step by step, and dropout is off."""
    weight = model.transformer.wte.weight
    ids, spans = torch.tensor([reading.ids], device=weight.device), reading.spans.to(weight.device)
    mask = as_mask(visible(spans), "eager", weight.dtype)
    with _eager(model):
        out = model.transformer(ids, attention_mask=mask, position_ids=positions_of(spans), use_cache=False)
    return out.last_hidden_state[0]


@contextmanager
def _eager(model: GPT2LMHeadModel) -> Iterator[None]:
    """In this context attention is computed step by step, so that its weights exist, and dropout is off."""
    implementation, was_training = model.config._attn_implementation, model.training
    model.config._attn_implementation = "eager"
    model.eval()
    try:
        yield
    finally:
        model.config._attn_implementation = implementation
        model.train(was_training)


@contextmanager
def _kept_attention(model: GPT2LMHeadModel, spans: Tensor, shown: int) -> Iterator[tuple[list[Tensor], list[str]]]:
    """Each layer's weights (H, S, S) and its heads' habits, as they come.

    Of a long text all layers' whole weights would not fit in memory.
    """
    maps: list[Tensor] = []
    told: list[str] = []

    def keep(module: nn.Module, given: Any, output: tuple[Tensor, Tensor]) -> None:
        weights = output[1][0].float()  # (H, T, T)
        maps.append(weights[:, -shown:, -shown:].cpu())
        told.extend(habits(weights, spans[0].to(weights.device)))

    hooks = [block.attn.register_forward_hook(keep) for block in model.transformer.h]
    try:
        yield maps, told
    finally:
        for hook in hooks:
            hook.remove()


def _log_probabilities(model: GPT2LMHeadModel, hidden: Tensor, entries: int) -> Iterator[Tensor]:
    """Hidden states (N, D) → log-probabilities (C, V) in fp32 on the CPU, chunk by chunk."""
    weight = model.transformer.wte.weight[:entries]
    for _, logits in logit_chunks(hidden, weight, rows=ROWS_OF_A_CHUNK, dtype=torch.float32):
        yield logits.log_softmax(1).cpu()


def nearest(weight: Tensor, ids: Sequence[int], entries: int, count: int) -> list[list[tuple[int, float]]]:
    """For each token the entries whose embeddings point most nearly the same way, and the cosines.

    Args:
        weight: (V, D) embeddings.
    """
    directions = torch.nn.functional.normalize(weight[:entries].detach().float(), dim=1)  # (V, D)
    own = torch.tensor(list(ids), device=weight.device)
    cosines = directions[own] @ directions.T  # (len(ids), V)
    cosines.scatter_(1, own[:, None], -torch.inf)
    values, found = cosines.topk(min(count, entries - 1))
    return [list(zip(row, near, strict=True)) for row, near in zip(found.tolist(), values.tolist(), strict=True)]
