"""Text model: a trained GPT-2 with its tokenizer, for use as a library, without Lightning and Hydra."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from gpt2lab.data.tokenizer import encode_texts, load_tokenizer
from gpt2lab.generation.completion import complete, prompt_ids
from gpt2lab.model.backbone import Backbone, load_backbone
from gpt2lab.settings import GREEDY, SamplingSettings
from gpt2lab.storage.model_folder import read_objective, resolve_model_folder


@dataclass(frozen=True)
class TextModel:
    """A model in evaluation mode and its tokenizer.

    Attributes:
        objective: training objective: clm, prefix_lm, mlm, fim or sampled_softmax.
    """

    backbone: Backbone
    tokenizer: PreTrainedTokenizerFast
    objective: str = "clm"

    def encode(self, text: str) -> Tensor:
        """Return the token ids of a text (1, T), on the model's device."""
        return torch.tensor(encode_texts([text], self.tokenizer), device=self.backbone.lm.device)

    def hidden_states(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the hidden states (B·T, D) of token ids (B, T), and the head weight (V, D), as `lm_head_loss` takes.

        Gradients follow the caller's grad mode.
        """
        return self.backbone(input_ids, lambda hidden, weight: (hidden.flatten(0, 1), weight))

    def generate(
        self, prompts: Sequence[str], sampling: SamplingSettings = GREEDY, max_new_tokens: int = 64, seed: int = 0
    ) -> list[str]:
        """Return the completion of each prompt; for mlm the prompt with its gaps filled.

        Raises:
            InputError: a prompt does not fit the objective.
        """
        ids = [prompt_ids(prompt, self.tokenizer, self.objective) for prompt in prompts]
        completions = complete(
            self.backbone.lm, self.tokenizer, self.objective, ids, sampling, max_new_tokens=max_new_tokens, seed=seed
        )
        return [self.tokenizer.decode(completion) for completion in completions]


def load_model(source: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> TextModel:
    """Load model and tokenizer of a run directory, a Hugging Face folder or a Hub id.

    Raises:
        InputError: missing, damaged, not a GPT-2, or without a tokenizer.
    """
    folder = str(resolve_model_folder(str(source), "source"))
    backbone = load_backbone(folder, dtype=dtype).to(device).eval()
    return TextModel(backbone, load_tokenizer(folder), read_objective(Path(folder)))
