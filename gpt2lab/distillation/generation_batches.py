"""Written text: prompts out of a batch, what a model writes after them, and the batch that this makes.

Each sequence draws from a seed of its own, so it is written the same whatever it is batched with, on however many
ranks.
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
class Written:
    """What was written after the prompt of a sample, as token ids; end-of-text, where it was written, is in `text`."""

    sample: int  # its number in the training set
    prompt: list[int]
    text: list[int]


@dataclass(frozen=True)
class Writer:
    """How text is written after prompts.

    Attributes:
        context: the most tokens that a sequence has; a prompt keeps the last context − max_new_tokens.
        entries: of the vocabulary that mean a token.
        seed: with a sequence's number it decides what is drawn.
    """

    context: int
    max_new_tokens: int
    temperature: float
    end_of_text: int
    entries: int
    seed: int

    def write(self, model: GPT2LMHeadModel, batch: Batch, step: int = 0) -> list[Written]:
        """What the model writes after each of the batch's prompts; another step, another text."""
        prompts = self.prompts(batch)
        texts = generate_ids(
            model,
            prompts,
            SamplingSettings("written", temperature=self.temperature),
            max_new_tokens=self.max_new_tokens,
            end_of_text=self.end_of_text,
            vocab_size=self.entries,
            row_seeds=self._row_seeds(batch.indices, step),
        )
        return [
            Written(sample, prompt, text if len(text) == self.max_new_tokens else [*text, self.end_of_text])
            for sample, prompt, text in zip(batch.indices.tolist(), prompts, texts, strict=True)
        ]

    def prompts(self, batch: Batch) -> list[list[int]]:
        """The prompts of pairs; of windows all but the last max_new_tokens positions."""
        room = self.context - self.max_new_tokens
        if batch.prompt_lengths is None:
            return batch.input_ids[:, :room].tolist()
        lengths = batch.prompt_lengths.tolist()
        return [row[:length][-room:] for row, length in zip(batch.input_ids.tolist(), lengths, strict=True)]

    def _row_seeds(self, indices: Tensor, step: int) -> list[int]:
        key = mix(mix(np.array([self.seed % 2**64], dtype=np.uint64)) ^ np.uint64(step))
        return (mix(indices.cpu().numpy().astype(np.uint64) ^ key) >> np.uint64(1)).tolist()


def collate(sequences: Sequence[Written], target_tokens: int, writer: Writer) -> Batch:
    """Sequences as one micro-batch, with labels on what was written."""
    return pad_pairs(
        [[PairTokens(torch.tensor(one.prompt + one.text), len(one.prompt), one.sample)] for one in sequences],
        target_tokens=target_tokens,
        context=writer.context,
        pad_id=writer.end_of_text,
    )
