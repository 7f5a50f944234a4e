"""Completion of prompts according to the training objective: text after a prompt, or in its gaps."""

from collections.abc import Callable, Sequence

import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from gpt2lab.data.fim import make_fim_prompt
from gpt2lab.data.special_tokens import MASK_PLACEHOLDER, SpecialTokens, find_special_tokens
from gpt2lab.data.tokenizer import encode_texts
from gpt2lab.errors import InputError
from gpt2lab.generation.sampling import generate_ids
from gpt2lab.model.attention_masks import format_mask
from gpt2lab.settings import OBJECTIVES, SamplingSettings
from gpt2lab.storage.utf8 import check_text

BATCH = 16  # prompts generated together
SEEDS = 2**63
SEED_STRIDE = 0x9E3779B97F4A7C15  # odd, so that seeds differ in the low 32 bits, the only ones a CPU generator uses


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase, objective: str) -> list[int]:
    """Tokenize a prompt as training text is; <|mask|> is one masked token for mlm, and a gap of any length for fim.

    Raises:
        InputError: a gap for an objective without gaps, more than one for fim, none for mlm; or no valid UTF-8.
    """
    check_text(prompt, f"The prompt {prompt}")
    parts = encode_texts(prompt.split(MASK_PLACEHOLDER), tokenizer)
    gaps = len(parts) - 1
    kind = OBJECTIVES[objective]
    if kind.fills_masks and gaps:
        mask = find_special_tokens(tokenizer).mask
        return [*parts[0], *(token for part in parts[1:] for token in (mask, *part))]
    if kind.infills and gaps == 1:
        return make_fim_prompt(parts[0], parts[1], find_special_tokens(tokenizer))
    if kind.fills_masks:
        raise InputError(
            f"A model of objective=mlm fills gaps, and the prompt has none.\nPut {MASK_PLACEHOLDER} for each token."
        )
    if gaps:
        raise InputError(
            f"The prompt has {gaps} gaps ({MASK_PLACEHOLDER}), and a model of objective={objective} fills "
            f"{'one at a time' if objective == 'fim' else 'none'}."
        )
    return parts[0]


def complete(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
    objective: str,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingSettings,
    *,
    max_new_tokens: int,
    seed: int = 0,
    row_seeds: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    streamer: BaseStreamer | None = None,
    on_texts: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Return the new tokens after each prompt; for mlm the prompt with its gaps filled.

    Args:
        objective: training objective of the model.
        prompts: token ids from `prompt_ids`; generated in batches of 16, each with its own seed.
        row_seeds: a seed for each prompt instead, so that its completion does not depend on the batch.
        stop: strings that end a completion.
        streamer: receives the tokens of a single prompt as they are generated.
        on_texts: receives the number of texts of each batch that is complete.
    """
    if OBJECTIVES[objective].fills_masks:
        return [fill_masks(model, prompt, find_special_tokens(tokenizer)) for prompt in prompts]
    completions: list[list[int]] = []
    for start in range(0, len(prompts), BATCH):
        batch = generate_ids(
            model,
            prompts[start : start + BATCH],
            sampling,
            max_new_tokens=max_new_tokens,
            end_of_text=tokenizer.eos_token_id,
            vocab_size=len(tokenizer),
            seed=distinct_seed(seed, start),
            row_seeds=None if row_seeds is None else row_seeds[start : start + BATCH],
            bidirectional=OBJECTIVES[objective].bidirectional_prompt,
            streamer=streamer,
            stop=stop,
            tokenizer=tokenizer,
        )
        completions += batch
        if on_texts is not None:
            on_texts(len(batch))
    return completions


def distinct_seed(seed: int, number: int) -> int:
    """Return the seed of the prompt or batch with this number."""
    return (seed + number * SEED_STRIDE) % SEEDS


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # compiled blocks would be recompiled for every length
def fill_masks(model: GPT2LMHeadModel, prompt: Sequence[int], special: SpecialTokens) -> list[int]:
    """Return the prompt with its masked tokens filled one by one, the most confident first.

    Source: mask-predict (Ghazvininejad et al. 2019, arXiv 1904.09324), one token per iteration.
    """
    device, was_training = model.transformer.wte.weight.device, model.training
    ids = torch.tensor([list(prompt)[-model.config.n_positions :]], device=device)  # (1, T)
    everything = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool, device=device)
    mask = format_mask(everything, model.config._attn_implementation, model.dtype)
    model.eval()
    while (gaps := (ids[0] == special.mask).nonzero().squeeze(1)).numel():
        logits = model(ids, attention_mask=mask, use_cache=False).logits[0, gaps, : special.vocab_size]  # (gaps, V)
        logits[:, special.mask] = -torch.inf
        confidence, tokens = logits.float().softmax(1).max(1)
        best = confidence.argmax()
        ids[0, gaps[best]] = tokens[best]
    model.train(was_training)
    return ids[0].tolist()
