"""Generation batches: prompts of a batch, the text that a model generates after them, and the resulting batch.

Each sequence is sampled with its own seed, so the text does not depend on the micro-batch or on the number of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from gpt2lab.data.batch import Batch, PairTokens, pad_pairs
from gpt2lab.data.data_order import mix
from gpt2lab.generation.sampling import generate_ids
from gpt2lab.settings import SamplingSettings


@dataclass(frozen=True)
class GeneratedSequence:
    """Token ids of a prompt and of the text generated after it; `text` ends with end-of-text if that was generated."""

    sample: int  # index in the training set
    prompt: list[int]
    text: list[int]


@dataclass(frozen=True)
class TextGenerator:
    """Generator of text after prompts.

    Attributes:
        context: maximum tokens of a sequence; prompts are truncated to the last context − max_new_tokens.
        vocab_size: number of tokens that can be generated; the rest of the head is padding.
        seed: seed of the sampling, combined with sample index and step.
    """

    context: int
    max_new_tokens: int
    temperature: float
    end_of_text: int
    vocab_size: int
    seed: int

    def generate(self, model: GPT2LMHeadModel, batch: Batch, step: int = 0) -> list[GeneratedSequence]:
        """Generate text after each prompt of the batch; it differs between steps."""
        prompts = self.prompts(batch)
        texts = generate_ids(
            model,
            prompts,
            SamplingSettings("generated", temperature=self.temperature),
            max_new_tokens=self.max_new_tokens,
            end_of_text=self.end_of_text,
            vocab_size=self.vocab_size,
            row_seeds=self._row_seeds(batch.indices, step),
        )
        return [
            GeneratedSequence(sample, prompt, text if len(text) == self.max_new_tokens else [*text, self.end_of_text])
            for sample, prompt, text in zip(batch.indices.tolist(), prompts, texts, strict=True)
        ]

    def prompts(self, batch: Batch) -> list[list[int]]:
        """Return the prompts of pairs, or windows without the last max_new_tokens positions."""
        longest = self.context - self.max_new_tokens
        if batch.prompt_lengths is None:
            return batch.input_ids[:, :longest].tolist()
        lengths = batch.prompt_lengths.tolist()
        return [row[:length][-longest:] for row, length in zip(batch.input_ids.tolist(), lengths, strict=True)]

    def _row_seeds(self, indices: Tensor, step: int) -> list[int]:
        key = mix(mix(np.array([self.seed % 2**64], dtype=np.uint64)) ^ np.uint64(step))
        return (mix(indices.cpu().numpy().astype(np.uint64) ^ key) >> np.uint64(1)).tolist()


def collate(sequences: Sequence[GeneratedSequence], target_tokens: int, generator: TextGenerator) -> Batch:
    """Collate sequences to one micro-batch, with labels on the generated text."""
    return pad_pairs(
        [[PairTokens(torch.tensor(one.prompt + one.text), len(one.prompt), one.sample)] for one in sequences],
        target_tokens=target_tokens,
        context=generator.context,
        pad_id=generator.end_of_text,
    )
