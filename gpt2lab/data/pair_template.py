"""Pair template: tokenize (source, target) texts with a template for each side, truncating long sources.

prompt = tokens of the prompt template with the source; response = tokens of the response template with the target, then
end-of-text. Prompt and response are tokenized separately, because generation starts from the prompt alone.
"""

import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from gpt2lab.data.tokenizer import PLAIN_TEXT, encode_texts
from gpt2lab.errors import InputError
from gpt2lab.storage.utf8 import check_text

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class PairTemplate:
    """Templates of both sides: `prompt` contains `{source}` once, `response` contains `{target}` once.

    All other text is literal, also braces in the data.

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
            f"Allowed: {{{field}}}, exactly once.\n"
            f"To use another column, set {field}={unknown[0]}"
        )
    if len(found) != 1:
        raise InputError(
            f"The {side} template {text!r} has {{{field}}} {len(found)} times; it must occur exactly once.\n"
            f"Write for example data.{side}=" + (r"$'{source}\n\nTL;DR:'" if side == "prompt" else "' {target}'")
        )


@dataclass(frozen=True)
class EncodedPair:
    prompt: list[int]
    response: list[int]  # ends with end-of-text
    shortened: bool  # whether the source was truncated


def encode_pairs(
    pairs: list[tuple[str, str]], template: PairTemplate, tokenizer: PreTrainedTokenizerFast, context: int
) -> list[EncodedPair | None]:
    """Tokenize (source, target) texts; None for a pair that does not fit even without its source.

    A pair fits if prompt and response have at most `context` + 1 tokens (the last token is only a target). If it does
    not, the end of the source is truncated, never the target or the template.
    """
    prompts = encode_texts([template.render_prompt(source) for source, _ in pairs], tokenizer)
    responses = encode_texts([template.render_response(target) for _, target in pairs], tokenizer)
    encoded: list[EncodedPair | None] = []
    for (source, _), prompt, response in zip(pairs, prompts, responses, strict=True):
        response.append(tokenizer.eos_token_id)
        limit = context + 1 - len(response)
        shortened = len(prompt) > limit
        if shortened:
            prompt = _truncate(source, template, tokenizer, len(prompt), limit)[1]
        encoded.append(EncodedPair(prompt, response, shortened) if prompt else None)
    return encoded


def fit_prompt(source: str, template: PairTemplate, tokenizer: PreTrainedTokenizerFast, limit: int) -> str:
    """Return the prompt of at most `limit` tokens with the longest beginning of the source.

    Raises:
        InputError: the template alone has more tokens.
    """
    prompt = template.render_prompt(source)
    check_text(prompt, f"The prompt {prompt}")
    length = len(encode_texts([prompt], tokenizer)[0])
    if length <= limit:
        return prompt
    prompt, ids = _truncate(source, template, tokenizer, length, limit)
    if not ids:
        raise InputError(
            f"The prompt template does not fit into {limit} tokens, even without a source.\nLower max_new_tokens."
        )
    return prompt


def _truncate(
    source: str, template: PairTemplate, tokenizer: PreTrainedTokenizerFast, full_length: int, limit: int
) -> tuple[str, list[int]]:
    """Return text and tokens of the prompt with the longest beginning of the source; ("", []) if none fits."""
    if limit < 1:
        return "", []
    # The text is truncated, not the ids, so that the prompt is the tokenization of its text.
    ends = [end for _, end in tokenizer(source, return_offsets_mapping=True, **PLAIN_TEXT)["offset_mapping"]]
    kept, length = len(ends), full_length
    while kept > 0:
        kept = max(kept - (length - limit), 0)
        prompt = template.render_prompt(source[: ends[kept - 1]] if kept else "")
        ids = encode_texts([prompt], tokenizer)[0]
        length = len(ids)
        if length <= limit:
            return prompt, ids
    return "", []
