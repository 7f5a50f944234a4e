"""On-policy batches: the micro-batches of an optimizer step that trains on the student's own text, not on the data's.

The text of a whole step is generated before its first micro-batch: the number of its targets divides the gradient.
Under FSDP every rank must call it: the student is run.
"""

from collections import deque
from dataclasses import replace
from typing import Any

import lightning
import numpy as np
import torch
import torch.distributed

from gpt2lab.data.batch import Batch
from gpt2lab.data.data_order import micro_batch_rows
from gpt2lab.distillation.generation_batches import Writer, Written, collate
from gpt2lab.distillation.on_policy import BUFFER, DATA, ReplayBuffer, TextChoice
from gpt2lab.settings import SequenceSettings
from lightning_modules.language_model import LanguageModel


class StudentText:
    """Replaces the data's text by the student's in the steps that are on-policy.

    Args:
        settings: gkd or distillm.
        context: the most tokens of a sequence.
        steps: of the whole run.
        seed: of the run.
        end_of_text, entries: of the tokenizer.
    """

    def __init__(
        self, settings: SequenceSettings, context: int, steps: int, seed: int, end_of_text: int, entries: int
    ) -> None:
        self.keeps = settings.name == "distillm"
        self.choice = TextChoice(settings, steps, seed)
        self.buffer = ReplayBuffer(settings.capacity if self.keeps else 0, seed)
        self.writer = Writer(context, settings.max_new_tokens, settings.gen_temperature, end_of_text, entries, seed)
        self._left: deque[Batch] = deque()  # of this step, still to be trained on

    def in_place_of(self, batch: Batch, part: int, student: LanguageModel) -> Batch:
        """Return the batch itself, or the student's text for micro-batch number `part` of the present step."""
        if part == 0:
            self._left = deque(self._step(student))
        return student.transfer_batch_to_device(self._left.popleft(), student.device, 0) if self._left else batch

    def state(self) -> dict[str, Any]:
        """Return the state for the checkpoint."""
        return {"choice": self.choice.state(), "buffer": self.buffer.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.choice.load(state["choice"])
        self.buffer.load(state["buffer"])

    def _step(self, student: LanguageModel) -> list[Batch]:
        """Return this rank's micro-batches of the step; none where it trains on the data's text."""
        step = student.trainer.global_step
        source = self.choice.of_step(step, self.buffer.is_full)
        if source == DATA:
            return []
        written = self._drawn(student.trainer, step) if source == BUFFER else self._written(student, step)
        own_targets = sum(len(one.text) for part in written for one in part)
        targets = int(student.over_ranks(torch.tensor(own_targets, device=student.device)))
        return [replace(collate(part, targets, self.writer), by_student=True) for part in written]

    def _written(self, student: LanguageModel, step: int) -> list[list[Written]]:
        """Generate text for this rank's micro-batches; where it is kept for later steps, every rank keeps all of it."""
        trainer, model = student.trainer, student.present_model()
        batches = [trainer.datamodule.training_batch(part) for part in range(trainer.accumulate_grad_batches)]
        written = [self.writer.write(model, batch, step) for batch in batches]
        if self.keeps:
            of_ranks: list[Any] = [written]
            if trainer.world_size > 1:
                of_ranks = [None] * trainer.world_size
                torch.distributed.all_gather_object(of_ranks, written)
            for parts in zip(*of_ranks, strict=True):  # in the order of the global batch, however it is shared out
                for part in parts:
                    self.buffer.add(part)
        return written

    def _drawn(self, trainer: lightning.Trainer, step: int) -> list[list[Written]]:
        """Return this rank's share of as many sequences of the buffer as a step has."""
        drawn = self.buffer.sample(trainer.datamodule.batch_sequences, step)
        parts, world = trainer.accumulate_grad_batches, trainer.world_size
        places = [part * world + trainer.global_rank for part in range(parts)]
        rows = [micro_batch_rows(np.arange(len(drawn)), place, parts * world) for place in places]
        return [[drawn[row] for row in part] for part in rows]
