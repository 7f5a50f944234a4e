"""Text from a model: greedy, top-k and nucleus sampling on prompts of different lengths, through `generate`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GPT2LMHeadModel, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from gpt2lab.attention_spans import as_mask

COLDEST = 1e-3  # below this temperature nothing but the likeliest token is left, and logits overflow


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedily below temperature 0.001, by beam search where there are several beams.

    Attributes:
        top_k, top_p, min_p, typical_p: which tokens are left in; 0, 1, 0 and 1 leave all.
        repetition_penalty: above 1 tokens that are there already become less likely.
        no_repeat_ngram: so many tokens in a row are never written twice; 0: no limit.
    """

    name: str
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    beams: int = 1
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature < COLDEST or self.beams > 1

    def choice(self) -> dict[str, Any]:
        """As arguments of `generate`; those that change nothing are left out, for some would cost time."""
        drawn = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p, "typical_p": self.typical_p}
        neutral = {"top_k": -1, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}  # top_k 0 must be said: its default is 50
        arguments: dict[str, Any] = {"do_sample": not self.is_greedy}
        if not self.is_greedy:
            arguments["temperature"] = self.temperature
            arguments |= {name: value for name, value in drawn.items() if value != neutral[name]}
        if self.beams > 1:
            arguments["num_beams"] = self.beams
        if self.repetition_penalty != 1:
            arguments["repetition_penalty"] = self.repetition_penalty
        if self.no_repeat_ngram:
            arguments["no_repeat_ngram_size"] = self.no_repeat_ngram
        return arguments


GREEDY = Sampling("greedy", temperature=0.0)
TOP_K = Sampling("top_k", temperature=0.8, top_k=50)
NUCLEUS = Sampling("nucleus", temperature=0.9, top_p=0.95)
FILL = Sampling("fill", temperature=0.0)  # of gaps, objective mlm


@torch.no_grad()
def generate_ids(
    model: GPT2LMHeadModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    end_of_text: int,
    seed: int = 0,
    row_seeds: Sequence[int] | None = None,
    entries: int | None = None,
    both_ways: bool = False,
    assistant: GPT2LMHeadModel | None = None,
    streamer: BaseStreamer | None = None,
    stop: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[list[int]]:
    """New token ids for each prompt, up to and without `end_of_text`. The global random state is left as it was.

    With `row_seeds`, one for each prompt, a prompt's completion does not depend on those beside it; then `seed`, top_k
    and top_p are not read. Of a vocabulary padded with entries that mean no token only the first `entries` are written.

    Prompts are padded on the left and masked, so a batch gives what each prompt alone would give. A prompt keeps its
    last tokens where prompt and completion together exceed the model's positions. An empty one starts at end_of_text.
    With `both_ways` the tokens of a prompt, but for its last, see each other both ways (objective prefix_lm).

    Args:
        assistant: a draft model (gpt2lab/speculative.py); takes one prompt.
        streamer: is given the tokens of one prompt as they come.
        stop: texts that end a completion, which holds them; needs the tokenizer.
    """
    room = model.config.n_positions - max_new_tokens
    if room < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} leaves no room in {model.config.n_positions} positions.")
    cut = [list(prompt)[-room:] or [end_of_text] for prompt in prompts]
    longest = max(len(prompt) for prompt in cut)
    device = model.transformer.wte.weight.device
    ids = torch.tensor([[end_of_text] * (longest - len(p)) + p for p in cut], device=device)  # (B, longest)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in cut], device=device)  # (B, longest)
    choice = sampling.choice()
    if row_seeds is not None and not sampling.is_greedy:
        noise = RowwiseSampling(sampling.temperature, row_seeds, device)
        choice = {"do_sample": False, "logits_processor": LogitsProcessorList([noise])}
    if assistant is not None:
        choice["assistant_model"] = assistant
    if streamer is not None:
        choice["streamer"] = streamer
    if stop:
        choice |= {"stop_strings": list(stop), "tokenizer": tokenizer}
    padding = list(range(entries or model.config.vocab_size, model.config.vocab_size))
    was_training = model.training
    model.eval()
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.compiler.set_stance("force_eager"),  # every token is another length, for which blocks would be compiled
    ):
        torch.manual_seed(seed)
        if both_ways and longest > 1:
            choice["past_key_values"] = _read_both_ways(model, ids[:, :-1], mask[:, :-1])
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=end_of_text,
            eos_token_id=end_of_text,
            use_cache=True,
            suppress_tokens=padding or None,
            **choice,
        )  # (B, longest + new)
    model.train(was_training)
    completions = output[:, longest:].tolist()
    return [ids[: ids.index(end_of_text)] if end_of_text in ids else ids for ids in completions]


def _read_both_ways(model: GPT2LMHeadModel, ids: Tensor, mask: Tensor) -> Cache:
    """Keys and values of prompts (B, L), padded on the left as the mask (B, L) says."""
    length = ids.shape[1]
    itself = torch.eye(length, dtype=torch.bool, device=ids.device)  # padding too must see something
    seen = mask.bool()[:, None, None, :] | itself  # (B, 1, L, L)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    mask_4d = as_mask(seen, model.config._attn_implementation, model.dtype)
    out = model.transformer(ids, attention_mask=mask_4d, position_ids=positions, use_cache=True)
    return out.past_key_values


class RowwiseSampling(LogitsProcessor):
    """Makes the likeliest token a draw from softmax(logits / temperature), each row with its own generator.

    Source: the Gumbel-max trick; −log of an exponential variate is a Gumbel variate.
    """

    def __init__(self, temperature: float, row_seeds: Sequence[int], device: torch.device) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in row_seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (B, V) → what argmax is taken of."""
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores / self.temperature - noise.log()
