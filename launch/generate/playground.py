"""Playground of generate.py serve=true: a model, its draft model, and speculative decoding of both, for one prompt."""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpt2lab.data.special_tokens import MASK_PLACEHOLDER
from gpt2lab.errors import InputError
from gpt2lab.generation.completion import prompt_ids
from gpt2lab.generation.sampling import generate_ids
from gpt2lab.generation.speculative import speculative_ids
from gpt2lab.keys import METADATA, bounds
from gpt2lab.reports.samples_jsonl import read_samples
from gpt2lab.reports.token_probabilities import Rounds, chances, pieces
from gpt2lab.settings import SamplingSettings
from launch.config.did_you_mean import nearest
from launch.config.key_value_cli import convert
from launch.generate.generator import Arguments, TextGenerator

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram")
SETTINGS = (*SAMPLING, "max_new_tokens", "seed")
FIELDS = {field.name: field for kind in (SamplingSettings, Arguments) for field in dataclasses.fields(kind)}
MAX_NEW_TOKENS = 512  # unless the command line sets more
MAX_VALUE_LENGTH = 40  # characters of a number
MAX_EXAMPLES = 4  # example prompts
EXAMPLES = (
    "def add(a, b):\n    return",
    "The history of the city begins",
    "Once upon a time",
)  # of a model without samples

Event = dict[str, Any]  # for JSON
Send = Callable[[Event], None]


@dataclass(frozen=True)
class GenerationRequest:
    """A checked request of the page."""

    prompt: str
    ids: list[int]
    sampling: SamplingSettings
    max_new_tokens: int
    seed: int


class Playground:
    """A loaded checkpoint and its optional draft model.

    Raises:
        InputError: the draft model does not exist or has another tokenizer.
    """

    def __init__(self, generator: TextGenerator) -> None:
        self.generator, self.tokenizer = generator, generator.tokenizer
        self.draft = generator.load_draft() if generator.arguments.draft else None
        self.max_new_tokens = min(max(MAX_NEW_TOKENS, generator.arguments.max_new_tokens), generator.positions - 1)

    def facts(self) -> dict[str, Any]:
        """Return models and settings for the page, as JSON."""
        arguments = self.generator.arguments
        panels = [{"name": "model", "source": arguments.checkpoint, "about": _about(self.generator.model)}]
        if self.draft is not None:
            panels.append({"name": "draft", "source": arguments.draft, "about": _about(self.draft)})
            panels.append({"name": "both", "source": "", "about": ""})
        return {
            "panels": panels,
            "prompt": arguments.source or arguments.prompt,
            "template": self.generator.template.prompt if self.generator.template else "",
            "templated": self.generator.template is not None and not arguments.prompt,
            "examples": self._examples(),
            "fills": MASK_PLACEHOLDER if self.generator.kind.infills else "",
            "positions": self.generator.positions,
            "settings": [self._setting(name) for name in SETTINGS],
        }

    def _examples(self) -> list[dict[str, Any]]:
        """Return example prompts: those of the samples of the model's run, as sources where it has a template."""
        run_dir, template = self.generator.folder.parent, self.generator.template
        usual = (f"def add(a, b):{MASK_PLACEHOLDER}    return total",) if self.generator.kind.infills else EXAMPLES
        prompts = list(dict.fromkeys(sample.prompt for sample in read_samples(run_dir))) or list(usual)
        before, after = template.prompt.split("{source}") if template else ("", "")
        sources = [prompt for prompt in prompts if template and prompt.startswith(before) and prompt.endswith(after)]
        found = [prompt[len(before) : len(prompt) - len(after)] for prompt in sources] or prompts
        return [{"text": text, "templated": bool(sources)} for text in found[:MAX_EXAMPLES]]

    def read(self, body: bytes) -> GenerationRequest:
        """Parse a request: a JSON object with `prompt`, or `source` for the prompt template, and any of the settings.

        Raises:
            InputError: the JSON is invalid, a value is out of range, or the prompt is empty, too long or not UTF-8.
        """
        given = _parse_object(body)
        prompt = self._prompt(given)
        arguments = self._arguments(given)
        ids = prompt_ids(prompt, self.tokenizer, self.generator.objective)
        limit = self.generator.positions - arguments.max_new_tokens
        if len(ids) > limit:
            raise InputError(
                f"The prompt has {len(ids):,} tokens; with {arguments.max_new_tokens:,} new tokens it may have "
                f"{limit:,}. Shorten it, or lower max_new_tokens."
            )
        return GenerationRequest(prompt, ids, arguments.sampling, arguments.max_new_tokens, arguments.seed)

    def _prompt(self, given: dict[str, Any]) -> str:
        """Remove the prompt from a request and return it, with the template around a source."""
        name, template = "source" if "source" in given else "prompt", self.generator.template
        text = given.pop(name, "")
        if not isinstance(text, str) or not text.strip():
            raise InputError("There is no prompt. Write a text for the model to continue.")
        if name == "prompt":
            return text
        if template is None:
            raise InputError("This model stores no prompt template for a source. Send the whole prompt as prompt.")
        return template.render_prompt(text)

    def write(self, request: GenerationRequest, send: Send) -> None:
        """Generate the text of every panel, one after the other.

        Args:
            send: receives every event; an exception in it ends the generation.
        """
        plain_speed = self._panel("model", self.generator.model, request, send)
        if self.draft is not None:
            self._panel("draft", self.draft, request, send)
            self._panel("both", self.generator.model, request, send, plain_speed)
        send({"finished": True})

    def warm_up(self) -> None:
        """Generate a short text, because the first generation is slower than later ones."""
        prompt = prompt_ids("a", self.tokenizer, "clm") or [self.tokenizer.eos_token_id]
        tokens = min(8, self.max_new_tokens)
        self.write(GenerationRequest("a", prompt, SamplingSettings("warm_up"), tokens, seed=0), lambda event: None)

    def _panel(
        self,
        name: str,
        model: "GPT2LMHeadModel",
        request: GenerationRequest,
        send: Send,
        plain_speed: float | None = None,
    ) -> float:
        """Stream one text, then send it with token probabilities; return tokens per second.

        Args:
            plain_speed: tokens per second without the draft model; None: decode without it.
        """
        before, _, after = request.prompt.partition(MASK_PLACEHOLDER)
        send({"panel": name, "before": before, "after": after})
        rounds = Rounds(self.tokenizer, lambda text: send({"panel": name, "text": text}))
        bidirectional = self.generator.kind.bidirectional_prompt
        is_plain = plain_speed is None
        begin = time.perf_counter()
        ids = self._ids(model, None if is_plain else self.draft, request, rounds)
        seconds = time.perf_counter() - begin
        scored = chances(model, request.ids, ids, vocab_size=len(self.tokenizer), bidirectional=bidirectional)
        found = pieces(self.tokenizer, ids, scored, () if is_plain else rounds.drafted)
        tokens = len(ids) + (len(ids) < request.max_new_tokens)  # includes an end-of-text token
        speed = tokens / seconds
        done: Event = {
            "pieces": [dataclasses.asdict(piece) for piece in found],
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": speed,
            "ended": len(ids) < request.max_new_tokens,
        }
        if plain_speed is not None:
            done |= {"speedup": speed / plain_speed, "calls": len(rounds.rounds), "drafted": sum(rounds.drafted)}
        send({"panel": name, "done": done})
        return speed

    def _ids(
        self, model: "GPT2LMHeadModel", draft: "GPT2LMHeadModel | None", request: GenerationRequest, rounds: Rounds
    ) -> list[int]:
        """Return the token ids of one text, generated by speculative decoding where there is a draft model."""
        settings: dict[str, Any] = {
            "max_new_tokens": request.max_new_tokens,
            "end_of_text": self.tokenizer.eos_token_id,
            "vocab_size": len(self.tokenizer),
            "seed": request.seed,
            "streamer": rounds,
        }
        if draft is not None:
            return speculative_ids(model, draft, request.ids, request.sampling, **settings)[0]
        bidirectional = self.generator.kind.bidirectional_prompt
        return generate_ids(model, [request.ids], request.sampling, bidirectional=bidirectional, **settings)[0]

    def _arguments(self, given: dict[str, Any]) -> Arguments:
        """Arguments of the command line, with the values of the page, which are checked the same way."""
        for name, value in given.items():
            if name not in SETTINGS:
                short = name[:MAX_VALUE_LENGTH]
                raise InputError(f"There is no setting {short}{nearest(short, SETTINGS)}.")
            if len(str(value)) > MAX_VALUE_LENGTH:
                raise InputError(f"{name} is not a number: it has {len(str(value)):,} characters.")
        values: dict[str, Any] = {name: convert(name, FIELDS[name], str(value)) for name, value in given.items()}
        sampled = {name: values.pop(name) for name in SAMPLING if name in values}
        arguments = self.generator.arguments
        sampling = dataclasses.replace(arguments.sampling, **sampled)
        arguments = dataclasses.replace(arguments, sampling=sampling, **values)
        if arguments.max_new_tokens > self.max_new_tokens:
            raise InputError(
                f"max_new_tokens={arguments.max_new_tokens} is out of range: this page generates at most "
                f"{self.max_new_tokens:,} tokens."
            )
        return arguments

    def _setting(self, name: str) -> dict[str, Any]:
        meaning, arguments = FIELDS[name].metadata[METADATA], self.generator.arguments
        low, high = bounds(meaning.within)
        if name == "max_new_tokens":
            high = self.max_new_tokens
        return {
            "name": name,
            "text": meaning.text,
            "value": (vars(arguments.sampling) | vars(arguments))[name],
            "whole": FIELDS[name].type is int,
            "low": low,
            "high": None if math.isinf(high) or high > 2**53 else high,
        }


def _parse_object(body: bytes) -> dict[str, Any]:
    try:
        given = json.loads(body.decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise InputError('The request is not JSON of the form {"prompt": "…", "temperature": 0.8}.')
    return given


def _about(model: "GPT2LMHeadModel") -> str:
    """Short description of a model's size."""
    config, parameters = model.config, sum(parameter.numel() for parameter in model.parameters())
    layers = "1 layer" if config.n_layer == 1 else f"{config.n_layer} layers"
    return f"{parameters / 1e6:,.1f} M parameters · {layers} of width {config.n_embd}"
