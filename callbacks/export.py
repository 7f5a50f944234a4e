"""Export: the run directory's Hugging Face folder `hf`, with the last weights or those of the best validation."""

import copy
import logging
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning import Trainer
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

from callbacks.best import find_best
from gpt2lab.errors import InputError
from gpt2lab.metric_names import MEASURED_BY_VALIDATION
from gpt2lab.reports.hf_folder import holds_model, verify_in_fresh_process, write_hf_folder
from gpt2lab.reports.model_card import STEPS, read_step
from gpt2lab.storage.checkpoint_ledger import checkpoint_file, is_intact
from gpt2lab.storage.model_folder import resolve_model_folder
from gpt2lab.storage.report_json import read_report

log = logging.getLogger(__name__)


class Export:
    """Writer of `hf` in a run directory.

    Args:
        run_dir: the run directory.
        card: facts of the model card that are known before training.
    """

    def __init__(self, run_dir: Path, card: Mapping[str, Any]) -> None:
        self.run_dir = run_dir
        self.folder = run_dir / "hf"
        self.card = card
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def write_gathered(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the weights that are in memory, gathered on the first rank; collective."""
        model = pl_module.export_on_first_rank()
        if model is not None:
            measured = measured_by_validation(trainer.callback_metrics)
            self._write(pl_module, model, trainer.global_step, pl_module.tokens_seen, measured)
        else:  # gathering the adapter is collective
            with tempfile.TemporaryDirectory(prefix=".adapter-", dir=self.run_dir) as unused:
                pl_module.export_adapter(Path(unused))

    def write_stored(
        self, pl_module: lightning.LightningModule, stored: dict[str, Any], step: int, metrics: Mapping[str, Any]
    ) -> None:
        """Write the weights of a whole checkpoint; another thread may call it while the module trains.

        Args:
            metrics: of the model card, measured by the validation of that step.
        """
        adapter = partial(pl_module.export_adapter, stored=stored)
        measured = measured_by_validation(metrics)
        self._write(pl_module, pl_module.stored_model(stored), step, stored["tokens_seen"], measured, adapter)

    def restore_best(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        """Write `hf` from the checkpoint of the best validation if it is of another step; on rank 0 only.

        A run that was killed between an export and its checkpoint has left the weights of a later step.
        """
        best = find_best(trainer)
        if not best.exports_best or best.step is None or read_step(self.folder) == best.step:
            return
        file = checkpoint_file(self.run_dir, best.step)
        if not is_intact(self.run_dir, file):
            log.warning(
                "%s is not of the best step %d, whose checkpoint is missing or damaged; later validations decide.",
                self.folder,
                best.step,
            )
            return
        self.write_stored(pl_module, trainer.strategy.checkpoint_io.load_checkpoint(file), best.step, best.metrics)

    def repair(self, trainer: Trainer, pl_module: lightning.LightningModule, is_of_this_process: bool) -> None:
        """Write `hf` again if it is missing or damaged; on rank 0 only.

        Args:
            is_of_this_process: whether this process has written it; otherwise it is compared with its checkpoint.
        """
        step, is_valid = exported_step(trainer), self._is_valid()
        metrics = find_best(trainer).metrics if step is not None else read_report(self.run_dir).get("metrics", {})
        step = trainer.global_step if step is None else step
        file = checkpoint_file(self.run_dir, step)
        if (is_valid and is_of_this_process) or not is_intact(self.run_dir, file):
            return
        stored = trainer.strategy.checkpoint_io.load_checkpoint(file)
        if is_valid and holds_model(self.folder, pl_module.stored_model(stored), pl_module.tokenizer):
            return
        log.warning("%s is missing or damaged and is written again.", self.folder)
        self.write_stored(pl_module, stored, step, metrics)

    def lacks_best(self, trainer: Trainer) -> bool:
        """Whether `hf` is not of the best validation, whose checkpoint is lost."""
        best_step = exported_step(trainer)
        return best_step is not None and read_step(self.folder) != best_step

    def verify(self) -> None:
        """Load `hf` in a new process and compare its logits.

        Raises:
            ExportError: it does not load, or they differ.
            OSError: it could not be verified.
        """
        model = GPT2LMHeadModel.from_pretrained(self.folder, dtype=torch.float32, trust_remote_code=False).eval()
        length = min(model.config.n_positions, 64)
        ids = torch.arange(2 * length).view(2, length) * 7919 % model.config.vocab_size  # (2, T) any fixed ids
        with torch.no_grad():
            difference = verify_in_fresh_process(self.folder, ids, model(ids).logits)
        log.info("%s loads with transformers only; largest difference of logits %.1e", self.folder, difference)

    def _is_valid(self) -> bool:
        try:
            return resolve_model_folder(str(self.folder), "init") == self.folder.resolve()
        except InputError:
            return False

    def _write(
        self,
        pl_module: lightning.LightningModule,
        model: GPT2LMHeadModel,
        step: int,
        tokens_seen: int,
        measured: Mapping[str, float],
        export_adapter: Callable[[Path], bool] | None = None,
    ) -> None:
        """Write `hf`, with a model card; Report adds the errors of the scores at the end."""
        facts = {"parameters": model.num_parameters(), STEPS: step, "tokens_seen": tokens_seen, "metrics": measured}
        card = {"title": self.run_dir.name, **self.card, **facts}
        if self._tokenizer is None:
            self._tokenizer = copy.deepcopy(pl_module.tokenizer)  # the one in use is not safe in two threads
        write_hf_folder(model, self._tokenizer, self.folder, card, export_adapter or pl_module.export_adapter)


def exported_step(trainer: Trainer) -> int | None:
    """Return the step of the best validation, whose weights are exported; None: the last weights are."""
    best = find_best(trainer)
    return best.step if best.exports_best else None


def measured_by_validation(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a validation as numbers."""
    return {name: float(value) for name, value in metrics.items() if name.startswith(MEASURED_BY_VALIDATION)}
