"""Samples: generate text during training, for samples.jsonl, the terminal and the loggers."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import lightning
from lightning import Trainer

from callbacks.interrupt import Interrupt
from callbacks.loggers.protocols import TakesSamples
from callbacks.throughput import SAMPLE, outside_training_time
from gpt2lab.data.batch import Batch
from gpt2lab.evaluation.text_metrics import text_score
from gpt2lab.metric_names import VALIDATION_PREFIX
from gpt2lab.reports.samples_jsonl import Sample, append_samples, drop_samples_after
from gpt2lab.settings import TEXT_METRICS
from gpt2lab.system.stop_request import Interrupted, is_urgent
from gpt2lab.system.terminal import printable, show

SHOWN_PROMPT, SHOWN_TEXT = 200, 600  # characters on the terminal


class Samples(lightning.Callback):
    """Complete each prompt every `every` steps and at the end, by each of the module's `sampling_methods`.

    Training is the same with and without it: `generate` restores the random state and the module's mode.

    Args:
        every: steps between samples.
        prompts: prompts; empty: those of the data module.
    """

    def __init__(self, every: int, prompts: list[str], max_new_tokens: int) -> None:
        self.every = every
        self.prompts = list(prompts)
        self.max_new_tokens = max_new_tokens
        self._references: list[str] = []
        self._due_step = -1  # step with interrupted samples, which the resumed run generates

    def state_dict(self) -> dict[str, Any]:
        return {"due_step": self._due_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._due_step = state_dict["due_step"]

    def on_train_start(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.is_global_zero:
            drop_samples_after(trainer.default_root_dir, trainer.global_step)
        if self._due_step == trainer.global_step:
            with outside_training_time(trainer, SAMPLE):
                self._sample(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step % self.every == 0 or step == trainer.max_steps
        if (batch_idx + 1) % trainer.accumulate_grad_batches or not due:
            return
        with outside_training_time(trainer, SAMPLE):
            self._sample(trainer, pl_module)

    def _sample(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the samples of this step; none if a signal arrives."""
        step, samples = trainer.global_step, []
        if not self.prompts:
            self.prompts = trainer.datamodule.sample_prompts(pl_module.tokenizer)
            self._references = trainer.datamodule.sample_references(pl_module.tokenizer)
        for method in pl_module.sampling_methods:  # on every rank: generation with a sharded model is collective
            completions: list[str] = []
            with suppress(Interrupted):
                completions = pl_module.generate(self.prompts, method, self.max_new_tokens)
            reason = pl_module.stop_request.agree()
            if is_urgent(reason):
                self._due_step = step
                self._stop(trainer, pl_module, reason)
                return
            samples += self._scored(step, method.label, completions, pl_module.watched_metric)
        self._due_step = -1
        if trainer.is_global_zero:
            self._show(trainer, samples)

    def _scored(self, step: int, method: str, completions: list[str], watched: str) -> list[Sample]:
        """Return the samples of one method; those with a reference have the watched metric as score, if it is one."""
        samples, name = [], watched.removeprefix(VALIDATION_PREFIX)
        references: Sequence[str | None] = self._references or [None] * len(completions)
        for prompt, completion, reference in zip(self.prompts, completions, references, strict=True):
            score = None
            if reference is not None and name in TEXT_METRICS:
                score = text_score(name, completion, reference)
            samples.append(Sample(step, prompt, completion, method, reference, score))
        return samples

    def _stop(self, trainer: Trainer, pl_module: lightning.LightningModule, reason: str) -> None:
        for callback in trainer.callbacks:
            if isinstance(callback, Interrupt):
                callback.stop_after_step(trainer, pl_module, reason)

    def _show(self, trainer: Trainer, samples: list[Sample]) -> None:
        step = samples[0].step
        append_samples(trainer.default_root_dir, samples)
        for logger in trainer.loggers:
            if isinstance(logger, TakesSamples):
                logger.log_samples(samples, step)
        show(shown_sample(samples))


def shown_sample(samples: Sequence[Sample]) -> str:
    """Return the first sample by nucleus sampling, or by the last method without it, as it is written."""
    of_nucleus = [sample for sample in samples if sample.method.startswith("nucleus")]
    method = (of_nucleus or samples)[-1].method
    sample = next(one for one in samples if one.method == method)
    prompt = sample.prompt if len(sample.prompt) <= SHOWN_PROMPT else f"… {sample.prompt[-SHOWN_PROMPT:]}"
    text = sample.written if len(sample.written) <= SHOWN_TEXT else f"{sample.written[:SHOWN_TEXT]} …"
    return printable(f"— sample of step {sample.step}, {method}\n{prompt}{text}")
