"""Token probabilities: generated tokens as pieces of text with their probabilities and the top alternatives.

Shapes: N generated tokens, D hidden width, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from gpt2lab.model.attention_masks import format_mask, make_spans, spans_to_mask

UNFINISHED = "\ufffd"  # decoded for the bytes of an incomplete character
CHUNK_ROWS = 64  # tokens scored at a time; 13 MB of probabilities for a vocabulary of 50,257


@dataclass(frozen=True)
class Chance:
    """Next-token probabilities at a generated token.

    Attributes:
        probability: probability of the token, before temperature, filters and penalties.
        top_tokens: top tokens with their probabilities.
    """

    probability: float
    top_tokens: list[tuple[int, float]]


@dataclass(frozen=True)
class Piece:
    """A token as text; tokens that form one character together are one piece.

    Attributes:
        probability: product over its tokens.
        top_tokens: top alternatives of its first token as text, with probabilities.
        drafted: whether all its tokens were proposed by a draft model and accepted.
    """

    text: str
    probability: float
    top_tokens: list[tuple[str, float]]
    drafted: bool = False


class IncrementalDecoder:
    """Decoder of tokens one by one whose parts concatenate to the decoded text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._before: list[int] = []  # some tokenizers decode a token depending on those before it
        self._open: list[int] = []

    def add(self, token: int) -> str:
        """Return the text of the token and pending ones before it; empty for an incomplete character."""
        self._open.append(token)
        text = self._text()
        return "" if text.endswith(UNFINISHED) else self._close(text)

    def rest(self) -> str:
        """Return the text of pending tokens at the end: an incomplete character."""
        return self._close(self._text()) if self._open else ""

    def _text(self) -> str:
        return self.tokenizer.decode(self._before + self._open)[len(self.tokenizer.decode(self._before)) :]

    def _close(self, text: str) -> str:
        self._before, self._open = self._open, []
        return text


class Rounds(BaseStreamer):
    """Streamer that records the tokens of a single text by round, one model call each, and emits their text.

    Args:
        emit: called with each piece of text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, emit: Callable[[str], None]) -> None:
        self.rounds: list[list[int]] = []
        self._decoder, self._emit, self._end_of_text = IncrementalDecoder(tokenizer), emit, tokenizer.eos_token_id
        self._prompt_is_past = False

    def put(self, value: Tensor) -> None:
        """Record token ids of any shape; the first call has the prompt."""
        if not self._prompt_is_past:
            self._prompt_is_past = True
            return
        self.rounds.append(value.flatten().tolist())
        self._emit("".join(self._decoder.add(token) for token in self.rounds[-1] if token != self._end_of_text))

    def end(self) -> None:
        """Emit the rest of the text, possibly an incomplete character."""
        self._emit(self._decoder.rest())

    @property
    def drafted(self) -> list[bool]:
        """Whether each token was drafted and accepted; the last token of a round is the target's."""
        return [number < len(one) - 1 for one in self.rounds for number in range(len(one))]


@torch.no_grad()
def chances(
    model: GPT2LMHeadModel,
    prompt: Sequence[int],
    written: Sequence[int],
    *,
    vocab_size: int,
    bidirectional: bool = False,
    top_tokens: int = 5,
) -> list[Chance]:
    """Compute the probabilities of each generated token, in one call.

    Args:
        prompt: at least one token; with `written` at most n_positions.
        vocab_size: number of tokens without padding of the vocabulary.
        bidirectional: whether attention within the prompt, except its last token, is bidirectional (prefix_lm).
        top_tokens: number of alternatives.
    """
    if not written:
        return []
    ids = torch.tensor([[*prompt, *written]], device=model.transformer.wte.weight.device)  # (1, T)
    length, mask = ids.shape[1] - 1, None
    if bidirectional:
        spans = make_spans(torch.zeros(1, length).long(), torch.full((1, length), length), len(prompt) - 1)
        mask = format_mask(spans_to_mask(spans).to(ids.device), model.config._attn_implementation, model.dtype)
    out = model.transformer(ids[:, :-1], attention_mask=mask, use_cache=False)
    hidden, targets = out.last_hidden_state[0, len(prompt) - 1 :], ids[0, len(prompt) :]  # (N, D), (N,)
    found: list[Chance] = []
    for states, tokens in zip(hidden.split(CHUNK_ROWS), targets.split(CHUNK_ROWS), strict=True):
        probabilities = model.lm_head(states)[:, :vocab_size].float().softmax(1)  # (n, V)
        own = probabilities.gather(1, tokens[:, None]).squeeze(1).tolist()
        top = probabilities.topk(min(top_tokens, vocab_size))
        rows = zip(own, top.indices.tolist(), top.values.tolist(), strict=True)
        found += [Chance(mine, list(zip(best, values, strict=True))) for mine, best, values in rows]
    return found


def pieces(
    tokenizer: PreTrainedTokenizerBase,
    written: Sequence[int],
    chances: Sequence[Chance],
    drafted: Sequence[bool] = (),
) -> list[Piece]:
    """Split generated tokens into pieces of text that concatenate to the whole.

    Args:
        chances: one per token.
        drafted: one per token, or empty.
    """
    decoder, found, start = IncrementalDecoder(tokenizer), list[Piece](), 0
    for number, token in enumerate(written, 1):
        text = decoder.add(token) or (decoder.rest() if number == len(written) else "")
        if not text:
            continue
        found.append(
            Piece(
                text,
                math.prod(chance.probability for chance in chances[start:number]),
                [(tokenizer.decode([other]), value) for other, value in chances[start].top_tokens],
                bool(drafted) and all(drafted[start:number]),
            )
        )
        start = number
    return found
