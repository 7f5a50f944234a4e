"""Text generation: greedy decoding, sampling and beam search for prompts of different lengths."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import (
    Cache,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from gpt2lab.generation.decoder import Decoder
from gpt2lab.generation.token_choice import TokenChoice, choice_device, logits_processors, row_uniforms
from gpt2lab.model.attention_masks import format_mask
from gpt2lab.settings import SamplingSettings


def generate_ids(
    model: GPT2LMHeadModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingSettings,
    *,
    max_new_tokens: int,
    end_of_text: int,
    seed: int = 0,
    row_seeds: Sequence[int] | None = None,
    vocab_size: int | None = None,
    bidirectional: bool = False,
    streamer: BaseStreamer | None = None,
    stop: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[list[int]]:
    """Generate token ids after each prompt, up to and without `end_of_text`.

    Prompts are padded on the left and masked, so a batch gives the same as each prompt alone. A prompt is truncated on
    the left if prompt and completion exceed the model's positions. An empty one starts with end_of_text. The global
    random state is restored.

    Args:
        row_seeds: a seed for each prompt instead of `seed`, so that its completion does not depend on the batch.
        vocab_size: number of tokens without padding of the vocabulary; None: all.
        bidirectional: whether attention within a prompt, except its last token, is bidirectional (prefix_lm).
        streamer: receives the tokens of a single prompt as they are generated; with beams, whose text is known at the
            end, nothing at each step.
        stop: strings that end a completion and remain in it; requires the tokenizer.
    """
    longest_prompt = model.config.n_positions - max_new_tokens
    if longest_prompt < 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} leaves no position for a prompt; the model has "
            f"{model.config.n_positions}. Lower max_new_tokens."
        )
    truncated = [list(prompt)[-longest_prompt:] or [end_of_text] for prompt in prompts]
    longest = max(len(prompt) for prompt in truncated)
    device = model.transformer.wte.weight.device
    padding = torch.tensor([longest - len(prompt) for prompt in truncated], device=device)  # (B,)
    ids = torch.tensor([[end_of_text] * (longest - len(p)) + p for p in truncated], device=device)  # (B, longest)
    stops = stopping_criteria(stop, tokenizer)
    chosen_on = choice_device(device)
    uniforms = None
    if row_seeds is not None and not sampling.is_greedy:
        uniforms = iter(row_uniforms(row_seeds, max_new_tokens).to(chosen_on))
    vocab_size = vocab_size or model.config.vocab_size
    processors = logits_processors(sampling, padding.to(chosen_on))
    choice = TokenChoice(processors, vocab_size, not sampling.is_greedy, chosen_on, uniforms)
    with generation_mode(model, seed=seed):
        if sampling.beams > 1:
            ids = _beam_search(
                model, ids, padding, sampling, stops, max_new_tokens, end_of_text, vocab_size, bidirectional, streamer
            )
        else:
            decoder = Decoder(model, longest + max_new_tokens, padding)
            if bidirectional and longest > 1:
                decoder.read(ids[:, :-1], bidirectional=True)
            ids = _generate(decoder, ids, choice, stops, max_new_tokens, end_of_text, streamer)
    completions = ids[:, longest:].tolist()
    return [row[: row.index(end_of_text)] if end_of_text in row else row for row in completions]


def stopping_criteria(stop: Sequence[str], tokenizer: PreTrainedTokenizerBase | None) -> StoppingCriteriaList:
    """Return the criteria that end a text whose last token completes one of the stop strings."""
    return StoppingCriteriaList([StopStringCriteria(tokenizer, list(stop))] if stop else [])


@contextmanager
def generation_mode(*models: GPT2LMHeadModel, seed: int) -> Iterator[None]:
    """Disable gradients, put the models in eval mode and seed the random state; restore all at the end of the context.

    Autocast keeps its copy of a weight for the next token, except in inference mode and of weights without gradient.
    """
    device = models[0].transformer.wte.weight.device
    has_autocast = torch.is_autocast_enabled(device.type)
    were_training = [model.training for model in models]
    for model in models:
        model.eval()
    random_state = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with random_state, torch.inference_mode(not has_autocast), torch.no_grad():
        torch.manual_seed(seed)
        try:
            yield
        finally:
            if has_autocast:
                torch.clear_autocast_cache()  # the copies have no gradient, and training needs their memory
            for model, was_training in zip(models, were_training, strict=True):
                model.train(was_training)


def _generate(
    decoder: Decoder,
    ids: Tensor,
    choice: TokenChoice,
    stops: StoppingCriteriaList,
    max_new_tokens: int,
    end_of_text: int,
    streamer: BaseStreamer | None,
) -> Tensor:
    """Extend prompts (B, L) to (B, L + new); a finished row is filled with end_of_text.

    `transformers`' generate has an overhead of 0.2 to 0.3 ms per token, as long as a step of model nano.
    """
    open_rows = torch.ones_like(ids[:, :1], dtype=torch.bool)  # (B, 1)
    longest = ids.shape[1] + max_new_tokens
    if streamer is not None:
        streamer.put(ids.cpu())
    while ids.shape[1] < longest:
        logits = decoder.read(ids[:, decoder.length :])[:, -1]  # (B, V)
        tokens = choice.tokens(choice.scores(ids, logits)).to(ids.device).where(open_rows, end_of_text)
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


def _beam_search(
    model: GPT2LMHeadModel,
    ids: Tensor,
    padding: Tensor,
    sampling: SamplingSettings,
    stops: StoppingCriteriaList,
    max_new_tokens: int,
    end_of_text: int,
    vocab_size: int,
    bidirectional: bool,
    streamer: BaseStreamer | None,
) -> Tensor:
    """Extend prompts as `_generate` does, with the beam search of `transformers`."""
    mask = (torch.arange(ids.shape[1], device=ids.device) >= padding[:, None]).long()  # (B, L)
    cache = None
    if bidirectional and ids.shape[1] > 1:
        cache = _prefill_bidirectional(model, ids[:, :-1], mask[:, :-1])
        cache.batch_repeat_interleave(sampling.beams)
    if streamer is not None:
        stops = StoppingCriteriaList([*stops, StreamerCall(streamer)])
    with torch.compiler.set_stance("force_eager"):  # compiled blocks would be recompiled for every length
        return model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=end_of_text,
            eos_token_id=end_of_text,
            use_cache=True,
            do_sample=False,
            num_beams=sampling.beams,
            length_penalty=sampling.length_penalty,
            past_key_values=cache,
            suppress_tokens=list(range(vocab_size, model.config.vocab_size)) or None,
            logits_processor=logits_processors(sampling, padding.repeat_interleave(sampling.beams)),
            stopping_criteria=stops,
        )


@torch.compiler.set_stance("force_eager")  # compiled blocks would be recompiled for every length
def _prefill_bidirectional(model: GPT2LMHeadModel, ids: Tensor, mask: Tensor) -> Cache:
    """Return the key-value cache of left-padded prompts (B, L) with their mask (B, L)."""
    diagonal = torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)  # padding attends to itself
    mask_4d = mask.bool()[:, None, None, :] | diagonal  # (B, 1, L, L)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    mask_4d = format_mask(mask_4d, model.config._attn_implementation, model.dtype)
    out = model.transformer(ids, attention_mask=mask_4d, position_ids=positions, use_cache=True)
    return out.past_key_values


class StreamerCall(StoppingCriteria):
    """Stopping criterion that ends no text: it calls a streamer, which may interrupt the generation, at each step."""

    def __init__(self, streamer: BaseStreamer) -> None:
        self.streamer = streamer

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return no row (B,) of the tokens (B, S) as finished."""
        self.streamer.put(input_ids.new_empty(0))
        return torch.zeros_like(input_ids[:, 0], dtype=torch.bool)
