"""Completion: what a model makes of a prompt, as its objective has taught it: text after it, or in its gaps."""

from collections.abc import Sequence

import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from gpt2lab.data.fim import gap_prompt
from gpt2lab.data.special_tokens import PLACE, Marks, marks_of
from gpt2lab.errors import InputError
from gpt2lab.generation.sampling import Sampling, generate_ids
from gpt2lab.model.attention_masks import as_mask
from gpt2lab.settings import OBJECTIVES

GENERATED_TOGETHER = 16  # prompts
SEEDS = 2**63
SEED_STRIDE = 0x9E3779B97F4A7C15  # odd, so that seeds differ in the low 32 bits, which are all that a CPU reads of them


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase, objective: str) -> list[int]:
    """Token ids of a prompt; <|mask|> in it is one hidden token for mlm, and a gap of any length for fim.

    Raises:
        InputError: a gap for a model that fills none, more than one for fim, none for mlm.
    """
    parts = [_encode(part, tokenizer) for part in prompt.split(PLACE)]
    gaps = len(parts) - 1
    kind = OBJECTIVES[objective]
    if kind.fills_masks and gaps:
        marks = marks_of(tokenizer)
        return [*parts[0], *(token for part in parts[1:] for token in (marks.mask, *part))]
    if kind.infills and gaps == 1:
        return gap_prompt(parts[0], parts[1], marks_of(tokenizer))
    if kind.fills_masks:
        raise InputError(f"A model of objective=mlm fills gaps, and the prompt has none.\nPut {PLACE} for each token.")
    if gaps:
        raise InputError(
            f"The prompt has {gaps} gaps ({PLACE}), and a model of objective={objective} fills "
            f"{'one at a time' if kind.infills else 'none'}."
        )
    return parts[0]


def complete(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
    objective: str,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    seed: int = 0,
    stop: Sequence[str] = (),
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """New tokens after each prompt, or under mlm the prompt with its gaps filled.

    Args:
        objective: that the model was trained with.
        prompts: as `prompt_ids` gives them; 16 are written together, each 16 with random numbers of their own.
        stop: texts that end a completion.
        streamer: is given the tokens of a single prompt as they come.
    """
    if OBJECTIVES[objective].fills_masks:
        return [filled(model, prompt, marks_of(tokenizer)) for prompt in prompts]
    completions: list[list[int]] = []
    for start in range(0, len(prompts), GENERATED_TOGETHER):
        completions += generate_ids(
            model,
            prompts[start : start + GENERATED_TOGETHER],
            sampling,
            max_new_tokens=max_new_tokens,
            end_of_text=tokenizer.eos_token_id,
            entries=len(tokenizer),
            seed=(seed + start * SEED_STRIDE) % SEEDS,
            both_ways=OBJECTIVES[objective].bidirectional_prompt,
            streamer=streamer,
            stop=stop,
            tokenizer=tokenizer,
        )
    return completions


@torch.no_grad()
def filled(model: GPT2LMHeadModel, prompt: Sequence[int], marks: Marks) -> list[int]:
    """The prompt with its hidden tokens filled in, the surest first and the others in its light.

    Source: mask-predict (Ghazvininejad et al. 2019, arXiv 1904.09324), one token a round.
    """
    device, was_training = model.transformer.wte.weight.device, model.training
    ids = torch.tensor([list(prompt)[-model.config.n_positions :]], device=device)  # (1, T)
    everything = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool, device=device)
    mask = as_mask(everything, model.config._attn_implementation, model.dtype)
    model.eval()
    while (places := (ids[0] == marks.mask).nonzero().squeeze(1)).numel():
        logits = model(ids, attention_mask=mask, use_cache=False).logits[0, places, : marks.entries]  # (gaps, V)
        logits[:, marks.mask] = -torch.inf
        surest, entries = logits.float().softmax(1).max(1)
        best = surest.argmax()
        ids[0, places[best]] = entries[best]
    model.train(was_training)
    return ids[0].tolist()


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text)["input_ids"] if text else []
