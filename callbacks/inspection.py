"""Inspect: at every validation a page that shows what goes on inside the model while it reads one and the same text.

inspect/step-000200.html                     attention, loss at every token, the live teacher beside it
inspect/projector, or tensorboard            token embeddings for TensorBoard's projector
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import lightning
import numpy as np
import torch
from lightning import Trainer
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

from callbacks.loggers.tensorboard import TensorBoard
from callbacks.throughput import outside_training_time
from gpt2lab.data.special_tokens import marks_of
from gpt2lab.generation.completion import filled, prompt_ids
from gpt2lab.reports.embedding_projector import write_projector
from gpt2lab.reports.inspection import Reading, reading_of_batch, reading_of_gaps, reading_of_text
from gpt2lab.reports.inspection_html import write_inspection
from gpt2lab.settings import OBJECTIVES
from gpt2lab.storage.atomic_files import told_when_full

log = logging.getLogger(__name__)

FOLDER = "inspect"
PAGE = re.compile(r"step-(\d+)(-\d+)?\.html")


class Inspect(lightning.Callback):
    """Looks at an export of the model on the CPU, so the trained one and its random state are left as they are.

    Args:
        texts: a page for each; empty: the beginning of the validation text. Under prefix_lm the first half of a text
            is read both ways; under mlm a text needs gaps, <|mask|>, which the model fills.
        tokens: so many of a text's first tokens are read; of a validation pair with a longer prompt as many as it takes
            to reach the answer, and attention is shown of the last so many.
        projector: whether the embeddings are written too; they are overwritten each time.
    """

    def __init__(self, run_dir: str, texts: list[str], tokens: int = 64, projector: bool = True) -> None:
        self.run_dir = Path(run_dir)
        self.folder = self.run_dir / FOLDER
        self.texts = list(texts)
        self.tokens = tokens
        self.projector = projector

    def on_train_start(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        """Texts that cannot be read are told now, and pages of steps that will be made again are removed."""
        for text in self.texts:
            prompt_ids(text, pl_module.tokenizer, pl_module.settings.objective.name)
        if not trainer.is_global_zero or not self.folder.is_dir():
            return
        for file in self.folder.iterdir():
            match = PAGE.fullmatch(file.name)
            if match and int(match.group(1)) > trainer.global_step:
                file.unlink()

    def on_validation_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        with outside_training_time(trainer), torch.no_grad():
            # Every rank, where the weights are shared out among them
            if pl_module.is_sharded or trainer.is_global_zero:
                model = pl_module.export_model()
                if trainer.is_global_zero:
                    with told_when_full(f"the inspection of step {trainer.global_step}", "Free some space."):
                        self._write(trainer, pl_module, model)
            trainer.strategy.barrier("inspection written")

    def _write(self, trainer: Trainer, pl_module: lightning.LightningModule, model: GPT2LMHeadModel) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        step, objective = trainer.global_step, pl_module.settings.objective.name
        teacher, source = pl_module.live_teacher()
        room = min([self.tokens, *(each.config.n_positions for each in (model, teacher) if each is not None)])
        for number, reading in enumerate(self._readings(trainer, model, pl_module.tokenizer, objective, room), 1):
            name = f"step-{step:06d}{f'-{number}' if number > 1 else ''}.html"
            write_inspection(
                self.folder / name,
                f"{self.run_dir.name}, step {step}",
                model,
                reading,
                pl_module.tokenizer,
                objective=objective,
                teacher=teacher,
                teacher_name=source,
                most=self.tokens,
            )
        if self.projector:
            # Where TensorBoard is told to look anyway
            shown = any(isinstance(logger, TensorBoard) for logger in trainer.loggers)
            folder = self.run_dir / "tensorboard" if shown else self.folder / "projector"
            write_projector(folder, model.transformer.wte.weight, pl_module.tokenizer)
        log.info("what goes on inside at step %d: %s", step, self.folder)

    def _readings(
        self, trainer: Trainer, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, objective: str, room: int
    ) -> Sequence[Reading]:
        """The texts as the model reads them, the given ones at most `room` tokens."""
        if not self.texts:
            batch = trainer.datamodule.val_samples.batch(np.zeros(1, dtype=np.int64), 0)
            return [reading_of_batch(batch, objective, room)]
        readings = []
        for text in self.texts:
            ids = prompt_ids(text, tokenizer, objective)[:room]
            if OBJECTIVES[objective].fills_masks:
                marks = marks_of(tokenizer)
                readings.append(reading_of_gaps(ids, filled(model, ids, marks), marks.mask))
            else:
                half = len(ids) // 2
                readings.append(reading_of_text(ids[:half], ids[half:], objective, written=False, room=room))
        return readings
