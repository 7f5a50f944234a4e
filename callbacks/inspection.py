"""Inspect: write a page about the model's attention and losses on a fixed text at every validation.

inspect/step-000200.html, and in W&B         attention, loss of every token, comparison with an online teacher
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

from callbacks.loggers.protocols import TakesPages
from callbacks.loggers.tensorboard import TensorBoard
from callbacks.throughput import VALIDATE, outside_training_time
from gpt2lab.data.special_tokens import find_special_tokens
from gpt2lab.generation.completion import fill_masks, prompt_ids
from gpt2lab.reports.embedding_projector import write_projector
from gpt2lab.reports.inspection import Reading, reading_of_batch, reading_of_gaps, reading_of_text
from gpt2lab.reports.inspection_html import write_inspection
from gpt2lab.settings import OBJECTIVES
from gpt2lab.storage.atomic_files import input_error_when_full

log = logging.getLogger(__name__)

FOLDER = "inspect"
PAGE = re.compile(r"step-(\d+)(-\d+)?\.html")


class Inspect(lightning.Callback):
    """Inspect an export of the model on the CPU, so that the trained model and its random state are unchanged.

    Args:
        texts: one page each; empty: the beginning of the validation text. For prefix_lm, attention in the first half of
            a text is bidirectional; for mlm a text needs gaps, <|mask|>, which the model fills.
        tokens: number of tokens read from the beginning of a text. More are read of a validation pair with a longer
            prompt, so that its response is reached; attention is shown for the last `tokens`.
        projector: whether to write the embeddings, too; they are overwritten each time.
    """

    def __init__(self, texts: list[str], tokens: int = 64, projector: bool = True) -> None:
        self.texts = list(texts)
        self.tokens = tokens
        self.projector = projector
        self.folder = Path()

    def setup(self, trainer: Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self.folder = Path(trainer.default_root_dir) / FOLDER

    def on_train_start(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        """Check the texts, and remove pages of steps that will be repeated."""
        for text in self.texts:
            prompt_ids(text, pl_module.tokenizer, pl_module.settings.objective.name)
        if not trainer.is_global_zero or not self.folder.is_dir():
            return
        for file in self.folder.iterdir():
            match = PAGE.fullmatch(file.name)
            if match and int(match.group(1)) > trainer.global_step:
                file.unlink()

    def on_validation_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        with outside_training_time(trainer, VALIDATE), torch.no_grad():
            # Exporting a sharded model is collective
            if pl_module.is_sharded or trainer.is_global_zero:
                model = pl_module.export_model()
                if trainer.is_global_zero:
                    with input_error_when_full(f"the inspection of step {trainer.global_step}", "Free some space."):
                        self._write(trainer, pl_module, model)
            trainer.strategy.barrier("inspection written")

    def _write(self, trainer: Trainer, pl_module: lightning.LightningModule, model: GPT2LMHeadModel) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        step, objective = trainer.global_step, pl_module.settings.objective.name
        teacher, source = pl_module.live_teacher()
        max_tokens = min([self.tokens, *(each.config.n_positions for each in (model, teacher) if each is not None)])
        for number, reading in enumerate(self._readings(trainer, model, pl_module.tokenizer, objective, max_tokens), 1):
            name = f"step-{step:06d}{f'-{number}' if number > 1 else ''}.html"
            write_inspection(
                self.folder / name,
                f"{self.folder.parent.name}, step {step}",
                model,
                reading,
                pl_module.tokenizer,
                objective=objective,
                teacher=teacher,
                teacher_name=source,
                most=self.tokens,
            )
            for logger in trainer.loggers:
                if isinstance(logger, TakesPages):
                    logger.log_page(f"inspect/text {number}", self.folder / name, step)
        if self.projector:
            has_tensorboard = any(isinstance(logger, TensorBoard) for logger in trainer.loggers)
            folder = self.folder.with_name("tensorboard") if has_tensorboard else self.folder / "projector"
            write_projector(folder, model.transformer.wte.weight, pl_module.tokenizer)
        log.info("inspection of step %d: %s", step, self.folder)

    def _readings(
        self,
        trainer: Trainer,
        model: GPT2LMHeadModel,
        tokenizer: PreTrainedTokenizerBase,
        objective: str,
        limit: int,
    ) -> Sequence[Reading]:
        """Return the readings of the texts, truncated to `limit` tokens, or of the validation data."""
        if not self.texts:
            batch = trainer.datamodule.val_samples.batch(np.zeros(1, dtype=np.int64), 0)
            return [reading_of_batch(batch, objective, limit)]
        readings = []
        for text in self.texts:
            ids = prompt_ids(text, tokenizer, objective)[:limit]
            if OBJECTIVES[objective].fills_masks:
                special = find_special_tokens(tokenizer)
                readings.append(reading_of_gaps(ids, fill_masks(model, ids, special), special.mask))
            else:
                half = len(ids) // 2
                readings.append(reading_of_text(ids[:half], ids[half:], objective, written=False, max_tokens=limit))
        return readings
