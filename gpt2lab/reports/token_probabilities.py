"""Token view: written tokens as pieces of text, each with its probability under the model and what it could have been.

Shapes: N written tokens, D hidden width, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from gpt2lab.model.attention_masks import as_mask, spans_of, visible

UNFINISHED = "\ufffd"  # what a tokenizer shows for bytes that make no character yet
SCORED_TOGETHER = 64  # tokens: at 50,257 entries 13 MB of probabilities


@dataclass(frozen=True)
class Chance:
    """What the model thought where it wrote a token.

    Attributes:
        probability: of the written token, before temperature, filters and penalties.
        likeliest: the likeliest tokens there with their probabilities.
    """

    probability: float
    likeliest: list[tuple[int, float]]


@dataclass(frozen=True)
class Piece:
    """A token as text; tokens that only together spell a character are one piece.

    Attributes:
        probability: of all its tokens.
        likeliest: what the first of them could have been, as text, with probabilities.
        drafted: whether a draft model proposed it, all of it, and the target kept it.
    """

    text: str
    probability: float
    likeliest: list[tuple[str, float]]
    drafted: bool = False


class Spelling:
    """Tokens to text, one by one, such that the parts add up to the text of all."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._before: list[int] = []  # some tokenizers spell a token by what stands before it
        self._open: list[int] = []

    def add(self, token: int) -> str:
        """What the token, with those before it that had no text yet, spells; empty where a character is unfinished."""
        self._open.append(token)
        text = self._text()
        return "" if text.endswith(UNFINISHED) else self._close(text)

    def rest(self) -> str:
        """What is left at the end: a character that was never finished."""
        return self._close(self._text()) if self._open else ""

    def _text(self) -> str:
        return self.tokenizer.decode(self._before + self._open)[len(self.tokenizer.decode(self._before)) :]

    def _close(self, text: str) -> str:
        self._before, self._open = self._open, []
        return text


class Rounds(BaseStreamer):
    """Takes the tokens of a single text as `generate` writes them: a round is what one call of the model settled.

    Args:
        tell: is given text as it comes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tell: Callable[[str], None]) -> None:
        self.rounds: list[list[int]] = []
        self._spelling, self._tell, self._end_of_text = Spelling(tokenizer), tell, tokenizer.eos_token_id
        self._prompt_is_past = False

    def put(self, value: Tensor) -> None:
        """Token ids of any shape; the first are the prompt's."""
        if not self._prompt_is_past:
            self._prompt_is_past = True
            return
        self.rounds.append(value.flatten().tolist())
        self._tell("".join(self._spelling.add(token) for token in self.rounds[-1] if token != self._end_of_text))

    def end(self) -> None:
        """The text ends here, if need be amid a character."""
        self._tell(self._spelling.rest())

    @property
    def drafted(self) -> list[bool]:
        """For each token whether it was drafted and kept: a round ends in the one token that the target adds."""
        return [number < len(one) - 1 for one in self.rounds for number in range(len(one))]


@torch.no_grad()
def chances(
    model: GPT2LMHeadModel,
    prompt: Sequence[int],
    written: Sequence[int],
    *,
    entries: int,
    both_ways: bool = False,
    likeliest: int = 5,
) -> list[Chance]:
    """What the model thinks of each written token, in one call.

    Args:
        prompt: at least one token; with what was written at most the model's positions.
        entries: of the vocabulary that mean a token.
        both_ways: the tokens of the prompt, but for its last, see each other both ways, as in `generate_ids`.
    """
    if not written:
        return []
    ids = torch.tensor([[*prompt, *written]], device=model.transformer.wte.weight.device)  # (1, T)
    length, mask = ids.shape[1] - 1, None
    if both_ways:
        spans = spans_of(torch.zeros(1, length).long(), torch.full((1, length), length), len(prompt) - 1)
        mask = as_mask(visible(spans).to(ids.device), model.config._attn_implementation, model.dtype)
    out = model.transformer(ids[:, :-1], attention_mask=mask, use_cache=False)
    hidden, targets = out.last_hidden_state[0, len(prompt) - 1 :], ids[0, len(prompt) :]  # (N, D), (N,)
    found: list[Chance] = []
    for states, tokens in zip(hidden.split(SCORED_TOGETHER), targets.split(SCORED_TOGETHER), strict=True):
        probabilities = model.lm_head(states)[:, :entries].float().softmax(1)  # (n, V)
        own = probabilities.gather(1, tokens[:, None]).squeeze(1).tolist()
        top = probabilities.topk(min(likeliest, entries))
        rows = zip(own, top.indices.tolist(), top.values.tolist(), strict=True)
        found += [Chance(mine, list(zip(best, values, strict=True))) for mine, best, values in rows]
    return found


def pieces(
    tokenizer: PreTrainedTokenizerBase,
    written: Sequence[int],
    chances: Sequence[Chance],
    drafted: Sequence[bool] = (),
) -> list[Piece]:
    """Written tokens as text; the pieces' texts add up to the text of all.

    Args:
        chances: one for each token.
        drafted: one for each token, or none.
    """
    spelling, found, start = Spelling(tokenizer), list[Piece](), 0
    for number, token in enumerate(written, 1):
        text = spelling.add(token) or (spelling.rest() if number == len(written) else "")
        if not text:
            continue
        found.append(
            Piece(
                text,
                math.prod(chance.probability for chance in chances[start:number]),
                [(tokenizer.decode([entry]), value) for entry, value in chances[start].likeliest],
                bool(drafted) and all(drafted[start:number]),
            )
        )
        start = number
    return found
