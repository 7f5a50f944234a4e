"""Playground: what serve=true shows — a model, its draft model, and the two together, writing on from one prompt."""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpt2lab.data.special_tokens import PLACE
from gpt2lab.errors import InputError
from gpt2lab.generation.completion import prompt_ids
from gpt2lab.generation.sampling import Sampling, generate_ids
from gpt2lab.generation.speculative import speculative_ids
from gpt2lab.reports.token_probabilities import Rounds, chances, pieces
from launch.config.did_you_mean import nearest
from launch.config.key_value_cli import parse
from launch.generate.generator import Arguments, Author, chosen_sampling

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

KNOBS: tuple[str, ...] = (
    *("temperature", "top_k", "top_p", "min_p", "typical_p"),
    *("repetition_penalty", "no_repeat_ngram", "max_new_tokens", "seed"),
)
MOST_NEW_TOKENS = 512  # unless the command line asks for more
LONGEST_VALUE = 40  # characters of a number

Event = dict[str, Any]  # for JSON
Tell = Callable[[Event], None]


@dataclass(frozen=True)
class Asked:
    """One press of the button, checked."""

    prompt: str
    ids: list[int]
    sampling: Sampling
    max_new_tokens: int
    seed: int


class Playground:
    """A loaded checkpoint, its draft model where there is one, and what may be asked of them.

    Raises:
        InputError: there is no such draft model, or it has other tokens.
    """

    def __init__(self, author: Author) -> None:
        self.author, self.tokenizer = author, author.tokenizer
        self.draft = author.load_draft() if author.arguments.draft else None
        self.most_new_tokens = min(max(MOST_NEW_TOKENS, author.arguments.max_new_tokens), author.positions - 1)

    def facts(self) -> dict[str, Any]:
        """What the page says about itself, for JSON."""
        arguments = self.author.arguments
        panels = [{"name": "model", "source": arguments.checkpoint, "about": _about(self.author.model)}]
        if self.draft is not None:
            panels.append({"name": "draft", "source": arguments.draft, "about": _about(self.draft)})
            panels.append({"name": "both", "source": "", "about": ""})
        return {
            "panels": panels,
            "prompt": arguments.prompt,
            "fills": PLACE if self.author.kind.infills else "",
            "positions": self.author.positions,
            "knobs": [self._knob(field) for field in dataclasses.fields(Arguments) if field.name in KNOBS],
        }

    def read(self, body: bytes) -> Asked:
        """What a request asks for: a JSON object with `prompt` and any of the knobs.

        Raises:
            InputError: anything else, a value out of range, or a prompt that is empty or too long.
        """
        given = _object(body)
        prompt = given.pop("prompt", "")
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError("There is no prompt. Write something that the model is to continue.")
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise InputError("The prompt holds half a character (a lone surrogate). Leave it out.") from None
        arguments = self._arguments(given)
        ids = prompt_ids(prompt, self.tokenizer, self.author.objective)
        room = self.author.positions - arguments.max_new_tokens
        if len(ids) > room:
            raise InputError(
                f"The prompt has {len(ids):,} tokens; beside {arguments.max_new_tokens:,} new ones there is room for "
                f"{room:,}. Shorten it, or write fewer tokens."
            )
        return Asked(prompt, ids, chosen_sampling(arguments), arguments.max_new_tokens, arguments.seed)

    def write(self, asked: Asked, tell: Tell) -> None:
        """Write in every panel, one after the other.

        Args:
            tell: is given what happens; ends the writing by raising.
        """
        alone = self._panel("model", self.author.model, asked, tell)
        if self.draft is not None:
            self._panel("draft", self.draft, asked, tell)
            self._panel("both", self.author.model, asked, tell, alone)
        tell({"finished": True})

    def warm_up(self) -> None:
        """A first text takes longer than those after it; so it is written before anybody looks at a speed."""
        prompt = self.tokenizer.encode("a") or [self.tokenizer.eos_token_id]
        tokens = min(8, self.most_new_tokens)
        self.write(Asked("a", prompt, Sampling("warm_up"), tokens, seed=0), lambda event: None)

    def _panel(
        self, name: str, model: "GPT2LMHeadModel", asked: Asked, tell: Tell, alone: float | None = None
    ) -> float:
        """One text, told as it comes and then once more with probabilities; returns tokens per second.

        Args:
            alone: tokens per second of the model without its draft model, which is used where this is given.
        """
        before, _, after = asked.prompt.partition(PLACE)
        tell({"panel": name, "before": before, "after": after})
        rounds = Rounds(self.tokenizer, lambda text: tell({"panel": name, "text": text}))
        both_ways = self.author.kind.bidirectional_prompt
        started = time.perf_counter()
        ids = self._ids(model, asked, rounds, both_ways) if alone is None else self._speculative_ids(asked, rounds)
        seconds = time.perf_counter() - started
        scored = chances(model, asked.ids, ids, entries=len(self.tokenizer), both_ways=both_ways)
        found = pieces(self.tokenizer, ids, scored, () if alone is None else rounds.drafted)
        tokens = len(ids) + (len(ids) < asked.max_new_tokens)  # an end-of-text among them
        speed = tokens / seconds
        done: Event = {
            "pieces": [dataclasses.asdict(piece) for piece in found],
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": speed,
            "ended": len(ids) < asked.max_new_tokens,
        }
        if alone is not None:
            done |= {"speedup": speed / alone, "calls": len(rounds.rounds), "drafted": sum(rounds.drafted)}
        tell({"panel": name, "done": done})
        return speed

    def _ids(self, model: "GPT2LMHeadModel", asked: Asked, rounds: Rounds, both_ways: bool) -> list[int]:
        (ids,) = generate_ids(
            model,
            [asked.ids],
            asked.sampling,
            max_new_tokens=asked.max_new_tokens,
            end_of_text=self.tokenizer.eos_token_id,
            entries=len(self.tokenizer),
            seed=asked.seed,
            both_ways=both_ways,
            streamer=rounds,
        )
        return ids

    def _speculative_ids(self, asked: Asked, rounds: Rounds) -> list[int]:
        assert self.draft is not None
        ids, _ = speculative_ids(
            self.author.model,
            self.draft,
            asked.ids,
            asked.sampling,
            max_new_tokens=asked.max_new_tokens,
            end_of_text=self.tokenizer.eos_token_id,
            entries=len(self.tokenizer),
            seed=asked.seed,
            streamer=rounds,
        )
        return ids

    def _arguments(self, given: dict[str, Any]) -> Arguments:
        """The command line's arguments with the page's values, which are held to the same ranges."""
        for name, value in given.items():
            if name not in KNOBS:
                raise InputError(f"There is no setting {name[:LONGEST_VALUE]}{nearest(name[:LONGEST_VALUE], KNOBS)}.")
            if len(str(value)) > LONGEST_VALUE:
                raise InputError(f"{name} is not a number: it has {len(str(value)):,} characters.")
        read = vars(parse(["checkpoint=", *(f"{name}={value}" for name, value in given.items())], Arguments))
        arguments = dataclasses.replace(self.author.arguments, **{name: read[name] for name in given})
        if arguments.max_new_tokens > self.most_new_tokens:
            raise InputError(
                f"max_new_tokens={arguments.max_new_tokens} is out of range: this page writes at most "
                f"{self.most_new_tokens:,} tokens."
            )
        return arguments

    def _knob(self, field: dataclasses.Field) -> dict[str, Any]:
        low, high = field.metadata["range"]
        if field.name == "max_new_tokens":
            high = self.most_new_tokens
        value = vars(self.author.arguments)[field.name]
        bounds = {"low": low, "high": None if math.isinf(high) or high > 2**53 else high}
        return {
            "name": field.name,
            "says": field.metadata["says"],
            "value": value,
            "whole": field.type is int,
            **bounds,
        }


def _object(body: bytes) -> dict[str, Any]:
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise InputError('That is not JSON of the form {"prompt": "…", "temperature": 0.8}.')
    return given


def _about(model: "GPT2LMHeadModel") -> str:
    """A model's size in a few words."""
    config, parameters = model.config, sum(parameter.numel() for parameter in model.parameters())
    layers = "1 layer" if config.n_layer == 1 else f"{config.n_layer} layers"
    return f"{parameters / 1e6:,.1f} M parameters · {layers} of width {config.n_embd}"
