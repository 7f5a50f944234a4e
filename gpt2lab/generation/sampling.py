"""Text from a model: greedy, top-k and nucleus sampling on prompts of different lengths."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    Cache,
    GPT2LMHeadModel,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from gpt2lab.generation.decoder import Decoder
from gpt2lab.model.attention_masks import as_mask

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

    @property
    def looks_back(self) -> bool:
        """Whether a token's chances depend on which tokens are there, beyond what the model makes of them."""
        return self.repetition_penalty != 1 or self.no_repeat_ngram > 0

    def processors(self, padding: Tensor | None = None) -> LogitsProcessorList:
        """What turns logits into those that are drawn from, in the order of `transformers`' generate.

        Args:
            padding: (B,) how many tokens at each row's left are no text; None: none.
        """
        processors = LogitsProcessorList()
        if self.repetition_penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty, prompt_ignore_length=padding))
        if self.no_repeat_ngram:
            processors.append(NoRepeatedNGram(self.no_repeat_ngram, padding))
        if self.is_greedy:
            return processors
        if self.temperature != 1:
            processors.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            processors.append(TopPLogitsWarper(self.top_p))
        if self.min_p:
            processors.append(MinPLogitsWarper(self.min_p))
        if self.typical_p < 1:
            processors.append(TypicalLogitsWarper(self.typical_p))
        return processors


GREEDY = Sampling("greedy", temperature=0.0)
TOP_K = Sampling("top_k", temperature=0.8, top_k=50)
NUCLEUS = Sampling("nucleus", temperature=0.9, top_p=0.95)
FILL = Sampling("fill", temperature=0.0)  # of gaps, objective mlm


@torch.inference_mode()
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
        streamer: is given the tokens of one prompt as they come.
        stop: texts that end a completion, which holds them; needs the tokenizer.
    """
    room = model.config.n_positions - max_new_tokens
    if room < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} leaves no room in {model.config.n_positions} positions.")
    cut = [list(prompt)[-room:] or [end_of_text] for prompt in prompts]
    longest = max(len(prompt) for prompt in cut)
    device = model.transformer.wte.weight.device
    padding = torch.tensor([longest - len(prompt) for prompt in cut], device=device)  # (B,)
    ids = torch.tensor([[end_of_text] * (longest - len(p)) + p for p in cut], device=device)  # (B, longest)
    stops = stopping(stop, tokenizer)
    processors = sampling.processors(padding)
    draws = not sampling.is_greedy
    if row_seeds is not None and draws:
        processors, draws = LogitsProcessorList([RowwiseSampling(sampling.temperature, row_seeds, device)]), False
    entries = entries or model.config.vocab_size
    with writing(model, seed=seed):
        if sampling.beams > 1:
            written = _search(model, ids, padding, sampling, stops, max_new_tokens, end_of_text, entries, both_ways)
        else:
            decoder = Decoder(model, longest + max_new_tokens, padding)
            if both_ways and longest > 1:
                decoder.read(ids[:, :-1], both_ways=True)
            written = _write(
                decoder, ids, Choice(processors, entries, draws), stops, max_new_tokens, end_of_text, streamer
            )
    completions = written[:, longest:].tolist()
    return [ids[: ids.index(end_of_text)] if end_of_text in ids else ids for ids in completions]


def stopping(stop: Sequence[str], tokenizer: PreTrainedTokenizerBase | None) -> StoppingCriteriaList:
    """What tells of texts (B, S) whether their last token completes one of the texts that end a completion."""
    return StoppingCriteriaList([StopStringCriteria(tokenizer, list(stop))] if stop else [])


@contextmanager
def writing(*models: GPT2LMHeadModel, seed: int) -> Iterator[None]:
    """In this context the models are in eval mode and random numbers follow from the seed; then all is as it was."""
    device = models[0].transformer.wte.weight.device
    were_training = [model.training for model in models]
    for model in models:
        model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            for model, was_training in zip(models, were_training, strict=True):
                model.train(was_training)


@dataclass(frozen=True)
class Choice:
    """How a token is chosen from logits, of which the first `entries` count."""

    processors: LogitsProcessorList
    entries: int
    draws: bool

    def scores(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Logits (B, V) after the tokens (B, S) → those (B, entries) that count."""
        return self.processors(ids, logits[:, : self.entries].float())

    def tokens(self, scores: Tensor) -> Tensor:
        """(B, entries) → (B, 1)."""
        return scores.softmax(1).multinomial(1) if self.draws else scores.argmax(1, keepdim=True)


def _write(
    decoder: Decoder,
    ids: Tensor,
    choice: Choice,
    stops: StoppingCriteriaList,
    max_new_tokens: int,
    end_of_text: int,
    streamer: BaseStreamer | None,
) -> Tensor:
    """Prompts (B, L) and what follows them, (B, L + new); after a row's end there is end_of_text.

    It is `transformers`' generate reduced to what is asked of it here, because that spends 0.2 to 0.3 ms on every
    token, as long as model nano computes.
    """
    open_rows = torch.ones_like(ids[:, :1], dtype=torch.bool)  # (B, 1)
    longest = ids.shape[1] + max_new_tokens
    if streamer is not None:
        streamer.put(ids.cpu())
    while ids.shape[1] < longest:
        logits = decoder.read(ids[:, decoder.length :])[:, -1]  # (B, V)
        tokens = choice.tokens(choice.scores(ids, logits)).where(open_rows, end_of_text)
        ids = torch.cat([ids, tokens], 1)
        if streamer is not None:
            streamer.put(tokens[:, 0].cpu())
        open_rows &= tokens != end_of_text
        if stops:
            open_rows &= ~stops(ids, logits)[:, None]
        if not open_rows.any():
            break
    if streamer is not None:
        streamer.end()
    return ids


def _search(
    model: GPT2LMHeadModel,
    ids: Tensor,
    padding: Tensor,
    sampling: Sampling,
    stops: StoppingCriteriaList,
    max_new_tokens: int,
    end_of_text: int,
    entries: int,
    both_ways: bool,
) -> Tensor:
    """As `_write`, by the beam search of `transformers`."""
    mask = (torch.arange(ids.shape[1], device=ids.device) >= padding[:, None]).long()  # (B, L)
    cache = None
    if both_ways and ids.shape[1] > 1:
        cache = _read_both_ways(model, ids[:, :-1], mask[:, :-1])
        cache.batch_repeat_interleave(sampling.beams)
    with torch.compiler.set_stance("force_eager"):  # every token is another length, for which blocks would be compiled
        return model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=end_of_text,
            eos_token_id=end_of_text,
            use_cache=True,
            do_sample=False,
            num_beams=sampling.beams,
            past_key_values=cache,
            suppress_tokens=list(range(entries, model.config.vocab_size)) or None,
            logits_processor=sampling.processors(padding.repeat_interleave(sampling.beams)),
            stopping_criteria=stops,
        )


def _read_both_ways(model: GPT2LMHeadModel, ids: Tensor, mask: Tensor) -> Cache:
    """Keys and values of prompts (B, L), padded on the left as the mask (B, L) says."""
    length = ids.shape[1]
    itself = torch.eye(length, dtype=torch.bool, device=ids.device)  # padding too must see something
    seen = mask.bool()[:, None, None, :] | itself  # (B, 1, L, L)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    mask_4d = as_mask(seen, model.config._attn_implementation, model.dtype)
    out = model.transformer(ids, attention_mask=mask_4d, position_ids=positions, use_cache=True)
    return out.past_key_values


class NoRepeatedNGram(NoRepeatNGramLogitsProcessor):
    """Bans tokens that would repeat some in a row; that of `transformers` takes padding for text that is there.

    Args:
        padding: (B,) how many tokens at each row's left are no text; None: none.
    """

    def __init__(self, size: int, padding: Tensor | None) -> None:
        super().__init__(size)
        self.padding = padding

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (B, V) after the tokens (B, S) → those with −inf where a token is banned."""
        if self.padding is not None:
            places = torch.arange(input_ids.shape[1], device=input_ids.device)
            input_ids = input_ids.masked_fill(places < self.padding[:, None], scores.shape[1])  # no token
        return super().__call__(input_ids, scores)


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
