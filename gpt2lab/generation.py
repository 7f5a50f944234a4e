"""Text from a model: greedy, top-k and nucleus sampling on prompts of different lengths, through `generate`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GPT2LMHeadModel

COLDEST = 1e-3  # below this temperature nothing but the likeliest token is left, and logits overflow


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedily below temperature 0.001; top_k 0 and top_p 1 leave all tokens in."""

    name: str
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


GREEDY = Sampling("greedy", temperature=0.0)
TOP_K = Sampling("top_k", temperature=0.8, top_k=50)
NUCLEUS = Sampling("nucleus", temperature=0.9, top_p=0.95)


@torch.no_grad()
def generate_ids(
    model: GPT2LMHeadModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    end_of_text: int,
    seed: int = 0,
) -> list[list[int]]:
    """New token ids for each prompt, up to and without `end_of_text`. The global random state is left as it was.

    Prompts are padded on the left and masked, so a batch gives what each prompt alone would give. A prompt keeps its
    last tokens where prompt and completion together exceed the model's positions. An empty one starts at end_of_text.
    """
    room = model.config.n_positions - max_new_tokens
    if room < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} leaves no room in {model.config.n_positions} positions.")
    cut = [list(prompt)[-room:] or [end_of_text] for prompt in prompts]
    longest = max(len(prompt) for prompt in cut)
    device = model.transformer.wte.weight.device
    ids = torch.tensor([[end_of_text] * (longest - len(p)) + p for p in cut], device=device)  # (B, longest)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in cut], device=device)  # (B, longest)
    if sampling.temperature < COLDEST:
        choice: dict[str, bool | float] = {"do_sample": False}
    else:
        choice = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
        }
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=end_of_text,
            eos_token_id=end_of_text,
            use_cache=True,
            **choice,
        )  # (B, longest + new)
    model.train(was_training)
    completions = output[:, longest:].tolist()
    return [ids[: ids.index(end_of_text)] if end_of_text in ids else ids for ids in completions]
