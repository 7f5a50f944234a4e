"""Micro-batches of windows or pairs: a rank's endless training stream, and sequential batches for evaluation."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import lightning
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast

from gpt2lab.data.batch import IGNORE_INDEX, Batch, Samples, ValidationSamples
from gpt2lab.data.data_order import micro_batch_rows, step_samples, validation_rows
from gpt2lab.system.socket_folder import shorten_for_multiprocessing

ENDLESS = 2**62


class TrainingStream(Dataset[Batch]):
    """Micro-batches of this rank from `first_step` on; item number = (step − first_step) · accumulate + part.

    Args:
        repeated_steps: number of first steps whose batches are repeated; 0: all are different.
    """

    def __init__(
        self,
        samples: Samples,
        batch: int,
        accumulate: int,
        seed: int,
        rank: int,
        world: int,
        first_step: int,
        repeated_steps: int = 0,
    ) -> None:
        self.samples = samples
        self.batch = batch
        self.accumulate = accumulate
        self.seed = seed
        self.rank = rank
        self.world = world
        self.first_step = first_step
        self.repeated_steps = repeated_steps

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, number: int) -> Batch:
        later, part = divmod(number, self.accumulate)
        step = self.first_step + later
        if self.repeated_steps:
            step %= self.repeated_steps
        of_step = step_samples(step, self.batch, len(self.samples), self.seed)
        positions = np.arange(self.batch, dtype=np.int64) + step * self.batch  # in the stream
        rows, keys = (
            micro_batch_rows(numbers, part * self.world + self.rank, self.accumulate * self.world)
            for numbers in (of_step, positions)
        )
        return self.samples.batch(rows, int(self.samples.target_counts(of_step, positions).sum()), keys)


class TrainingLoader(DataLoader[Batch]):
    """DataLoader over a `TrainingStream`, with the state that makes it resumable for Lightning.

    The state is the trainer's optimizer step, from which the data order follows: batches loaded ahead of it do not
    count, and a step that was stopped within starts again from its first micro-batch.
    """

    optimizer_step: Callable[[], int]  # step that is trained now
    _is_restored = False  # whether a state was loaded since the last iteration

    def __iter__(self) -> Any:
        """Continue with the optimizer step; Lightning starts again where trainer.limit_train_batches ends its epoch."""
        assert isinstance(self.dataset, TrainingStream)
        if not self._is_restored:
            self.dataset.first_step = self.optimizer_step()
        self._is_restored = False
        return super().__iter__()

    def state_dict(self) -> dict[str, int]:
        """Return the optimizer step."""
        return {"step": self.optimizer_step()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start from the optimizer step of a state."""
        assert isinstance(self.dataset, TrainingStream)
        self.dataset.first_step, self._is_restored = state["step"], True


class SequentialBatches(Dataset[Batch]):
    """Batches of the samples `rows`, by default all, in order; rank r takes batches r, r + world, …

    All ranks have the same number of batches, because the forward of a sharded model is collective. If necessary the
    last ranks end with an empty batch: one row of ignored labels and target_tokens 0.
    """

    def __init__(
        self, samples: Samples, batch: int, rank: int, world: int, rows: NDArray[np.int64] | None = None
    ) -> None:
        self.samples = samples
        self.rows = np.arange(len(samples), dtype=np.int64) if rows is None else rows
        self.batch = batch
        self.rank = rank
        self.world = world

    def __len__(self) -> int:
        return -(-len(self.rows) // (self.batch * self.world))

    def __getitem__(self, number: int) -> Batch:
        if number >= len(self):
            raise IndexError(number)
        first = (self.rank + number * self.world) * self.batch
        rows = self.rows[first : first + self.batch]
        if not len(rows):
            return self._filler()
        batch = self.samples.batch(rows, int(self.samples.target_counts(rows).sum()))
        return replace(batch, places=torch.arange(first, first + len(rows)))

    def _filler(self) -> Batch:
        filler = self.samples.batch(np.zeros(1, dtype=np.int64), 0)
        none = torch.empty(0, dtype=torch.int64)
        return replace(
            filler,
            labels=torch.full_like(filler.labels, IGNORE_INDEX),
            indices=none,
            places=none,
            prompt_lengths=None if filler.prompt_lengths is None else none,
            references=None if filler.references is None else [],
            documents=None if filler.documents is None else none,
        )


class SampleDataModule(lightning.LightningDataModule):
    """Base data module with loaders over the two sides that `prepare` opens.

    Args:
        batch_sequences: samples of the global batch of one optimizer step.
        accumulate: micro-batches of one step on each rank.
        eval_batch_sequences: samples of one validation batch.
        validate_tokens: most tokens of a validation; None: the whole split.

    Attributes:
        val_rows: validated samples of `val_samples`, ascending; `prepare` sets it.
    """

    kind: Literal["text", "pairs"]  # as in conf/data/*.yaml
    train_samples: Samples
    val_samples: ValidationSamples
    val_rows: NDArray[np.int64]

    def __init__(
        self,
        batch_sequences: int,
        accumulate: int,
        seed: int,
        workers: int,
        eval_batch_sequences: int,
        validate_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_sequences = batch_sequences
        self.accumulate = accumulate
        self.seed = seed
        self.workers = workers
        self.eval_batch_sequences = eval_batch_sequences
        self.validate_tokens = validate_tokens

    def train_dataloader(self) -> DataLoader:
        """Load micro-batches of this rank from the trainer's optimizer step on, without end."""
        if self.workers:
            shorten_for_multiprocessing()
        loader = TrainingLoader(
            self._stream(), batch_size=None, shuffle=False, num_workers=self.workers, pin_memory=self._feeds_gpu
        )
        loader.optimizer_step = lambda: self._rank_and_step()[2]
        return loader

    def training_batch(self, part: int) -> Batch:
        """Return micro-batch number `part` of this rank at the trainer's optimizer step."""
        return self._stream()[part]

    def val_dataloader(self) -> DataLoader:
        """Load the validated samples once, distributed over the ranks."""
        return self.scoring_dataloader(self.val_rows)

    def scoring_dataloader(self, rows: NDArray[np.int64]) -> DataLoader:
        """Load the validation samples `rows` once, distributed over the ranks."""
        return self._sequential_loader(self.val_samples, rows)

    def validation_rows(self, limit: int | None) -> NDArray[np.int64]:
        """Return the rows (n,), ascending, of a fixed sample of the validation split.

        They depend on the data only, not on seed, devices or batches.

        Args:
            limit: most tokens of the sample; None: the whole split.
        """
        return validation_rows(*self.val_samples.numbered_tokens(), limit)

    @property
    def validates_all(self) -> bool:
        """Whether a validation reads the whole split."""
        return len(self.val_rows) == len(self.val_samples)

    def train_eval_dataloader(self) -> DataLoader:
        """Load the training split once in file order, for evaluation."""
        return self._sequential_loader(self.train_samples)

    def calibration_batches(self, samples: int) -> Iterator[Batch]:
        """Yield up to `samples` training samples, evenly spaced: the same on every rank and for every seed."""
        rows = self.calibration_rows(samples)
        for part in np.array_split(rows, -(-len(rows) // self.eval_batch_sequences)):
            yield self.train_samples.batch(part, int(self.train_samples.target_counts(part).sum()))

    def calibration_rows(self, samples: int) -> NDArray[np.int64]:
        """Return the row numbers of the calibration samples."""
        return np.unique(np.arange(samples, dtype=np.int64) * len(self.train_samples) // samples)

    def sample_prompts(self, tokenizer: PreTrainedTokenizerFast) -> list[str]:
        """Return a few prompts for samples during training."""
        raise NotImplementedError

    def sample_references(self, tokenizer: PreTrainedTokenizerFast) -> list[str]:
        """Return the reference text of each of these prompts; empty for data without any."""
        return []

    def token_counts(self) -> NDArray[np.int64]:
        """Count how often each token is a training target: (V,)."""
        raise NotImplementedError

    def _stream(self) -> TrainingStream:
        rank, world, first_step = self._rank_and_step()
        repeated = int(self.trainer.overfit_batches) // self.accumulate if self.trainer is not None else 0
        return TrainingStream(
            self.train_samples, self.batch_sequences, self.accumulate, self.seed, rank, world, first_step, repeated
        )

    def _sequential_loader(self, samples: Samples, rows: NDArray[np.int64] | None = None) -> DataLoader:
        rank, world, _ = self._rank_and_step()
        batches = SequentialBatches(samples, self.eval_batch_sequences, rank, world, rows)
        return DataLoader(batches, batch_size=None, shuffle=False, pin_memory=self._feeds_gpu)

    @property
    def _feeds_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _rank_and_step(self) -> tuple[int, int, int]:
        """Return (rank, number of ranks, optimizer step to start from)."""
        if self.trainer is None:
            return 0, 1, 0
        return self.trainer.global_rank, self.trainer.world_size, self.trainer.global_step
