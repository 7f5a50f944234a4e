"""How a pair of texts becomes token ids: a template around each side, the source cut where the context is too short.

prompt = tokens of the prompt template with the source in it; response = tokens of the response template with the target
in it, then end-of-text. Prompt and response are tokenized apart, because at generation time the prompt stands alone.
"""

import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from gpt2lab.errors import InputError

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class PairTemplate:
    """`prompt` holds `{source}` once, `response` `{target}` once; all other text is literal, braces in the data too.

    Raises:
        InputError: a placeholder is missing, repeated or unknown.
    """

    prompt: str
    response: str

    def __post_init__(self) -> None:
        _check_side("prompt", self.prompt, "source")
        _check_side("response", self.response, "target")

    def render_prompt(self, source: str) -> str:
        before, after = self.prompt.split("{source}")
        return before + source + after

    def render_response(self, target: str) -> str:
        before, after = self.response.split("{target}")
        return before + target + after


def _check_side(side: str, text: str, field: str) -> None:
    found = _PLACEHOLDER.findall(text)
    unknown = [name for name in found if name != field]
    if unknown:
        raise InputError(
            f"The {side} template {text!r} has the unknown field {{{unknown[0]}}}.\n"
            f"Allowed there: {{{field}}}, exactly once.\n"
            f"To take another column, name it: {field}={unknown[0]}"
        )
    if len(found) != 1:
        raise InputError(
            f"The {side} template {text!r} has {{{field}}} {len(found)} times; it must stand there exactly once.\n"
            f"Write for example data.{side}='" + ("{source}\\n\\nTL;DR:'" if side == "prompt" else " {target}'")
        )


@dataclass(frozen=True)
class EncodedPair:
    prompt: list[int]
    response: list[int]  # ends with end-of-text
    shortened: bool  # the source lost its end


def encode_pairs(
    pairs: list[tuple[str, str]], template: PairTemplate, tokenizer: PreTrainedTokenizerFast, context: int
) -> list[EncodedPair | None]:
    """(source, target) texts → token ids, or None where not even the pair without its source fits.

    A pair fits when prompt and response together have at most `context` + 1 tokens (the last one is only ever a
    target). One that does not fit loses the end of its source; the target and the template's own text are never cut.
    """
    prompts = _encode(tokenizer, [template.render_prompt(source) for source, _ in pairs])
    responses = _encode(tokenizer, [template.render_response(target) for _, target in pairs])
    encoded: list[EncodedPair | None] = []
    for (source, _), prompt, response in zip(pairs, prompts, responses, strict=True):
        response.append(tokenizer.eos_token_id)
        room = context + 1 - len(response)
        shortened = len(prompt) > room
        if shortened:
            prompt = _shortened_prompt(source, template, tokenizer, len(prompt), room)
        encoded.append(EncodedPair(prompt, response, shortened) if prompt else None)
    return encoded


def _shortened_prompt(
    source: str, template: PairTemplate, tokenizer: PreTrainedTokenizerFast, full_length: int, room: int
) -> list[int]:
    """The prompt around the longest beginning of the source that leaves at most `room` tokens; [] if none does."""
    if room < 1:
        return []
    # Text is cut, not ids, so that the prompt stays what the tokenizer makes of its text.
    ends = [end for _, end in tokenizer(source, return_offsets_mapping=True, **_PLAIN)["offset_mapping"]]
    kept, length = len(ends), full_length
    while kept > 0:
        kept = max(kept - (length - room), 0)
        shortened = source[: ends[kept - 1]] if kept else ""
        prompt = _encode(tokenizer, [template.render_prompt(shortened)])[0]
        length = len(prompt)
        if length <= room:
            return prompt
    return []


# A text that happens to spell <|endoftext|> is text, not the end of one.
_PLAIN = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}


def _encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, return_attention_mask=False, **_PLAIN)["input_ids"]
