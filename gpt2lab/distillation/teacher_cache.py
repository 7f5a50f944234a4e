"""Teacher cache: a teacher's next-token distributions on disk, written once and read by all of its students.

    train.bin, val.bin      one record per target, in the order of the samples; samples whose text is not generated yet
                            reserve their maximum number of records
    train.index, val.index  int64 (S + 1,): first record of each of the S samples
    train.nats, val.nats    float32 (S,): the teacher's loss summed over a sample's targets; NaN: not written yet
    key.json                everything that the records depend on; its hash is in the folder's name

A sample's nats are written after its records are on the disk. So a killed writer can be resumed, and an incomplete
sample is never read. The files are sparse, have their full size from the start, and are read through a memory map.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt2lab.data.batch import IGNORE_INDEX, Batch, Samples
from gpt2lab.data.data_order import uniforms
from gpt2lab.data.token_file import map_file, token_dtype
from gpt2lab.errors import InputError
from gpt2lab.losses.dense_teacher import DenseTeacher
from gpt2lab.losses.logit_chunks import logit_chunks
from gpt2lab.losses.sampled_teacher import SampledTeacher
from gpt2lab.losses.teacher_signal import TeacherSignal
from gpt2lab.losses.top_k_teacher import TopKTeacher
from gpt2lab.settings import LossSettings, TeacherCacheSettings
from gpt2lab.storage.atomic_files import flush
from gpt2lab.system.determinism import has_deterministic_cumsum
from gpt2lab.system.device import copied_to, widest_float

LOGITS_AT_A_TIME = 2**24
SAMPLES_OF_A_COMMIT = 256
VALIDATION_TOKENS = 64
SMALLEST_STORED = -6e4  # log-probability; within the range of float16


def record_type(settings: TeacherCacheSettings, vocab_size: int) -> np.dtype:
    """Return the dtype of a record: 2 n + 2 bytes, or 4 k + 4 in float16, for a vocabulary size up to 65,536.

    Log-probabilities are stored, since float16 has no value between 0 and 6e-8.
    """
    number = np.dtype(settings.dtype).newbyteorder("<")
    if settings.name == "sampled":
        return np.dtype([("ids", token_dtype(vocab_size), (settings.n,)), ("entropy", "<f2")])
    ids, logs = ("ids", token_dtype(vocab_size), (settings.k,)), ("logs", number, (settings.k,))
    return np.dtype([ids, logs, ("tail_log", "<f4")])


class CacheSide:
    """Records of one side of the split.

    Args:
        folder: folder of the cache.
        side: train or val.
        settings: kind of record; with `tail` off, the top-k probabilities are normalized when read.
        vocab_size: vocabulary size of the softmax.
    """

    def __init__(self, folder: Path, side: str, settings: TeacherCacheSettings, vocab_size: int) -> None:
        self.side = side
        self.settings = settings
        self.vocab_size = vocab_size
        self._record = record_type(settings, vocab_size)
        self._files = {part: folder / f"{side}.{part}" for part in ("bin", "index", "nats")}

    def create(self, samples: Samples, max_targets: int | None = None) -> None:
        """Create empty files unless they exist with the expected sizes.

        Args:
            max_targets: records to reserve per sample, for text that is not generated yet; None: the text is known.
        """
        counts = (
            samples.target_counts(np.arange(len(samples)))
            if max_targets is None
            else np.full(len(samples), max_targets)
        )
        index = np.concatenate([[0], np.cumsum(counts)]).astype("<i8")
        sizes = {"bin": int(index[-1]) * self._record.itemsize, "index": index.nbytes, "nats": 4 * len(samples)}
        if all(file.is_file() and file.stat().st_size == sizes[part] for part, file in self._files.items()):
            return
        self._files["nats"].unlink(missing_ok=True)
        self._files["index"].write_bytes(index.tobytes())
        with self._files["bin"].open("wb") as records:
            records.truncate(sizes["bin"])
        self._files["nats"].write_bytes(np.full(len(samples), np.nan, "<f4").tobytes())
        for file in self._files.values():
            flush(file)

    def missing(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the samples among `rows` that are not written yet, in ascending order."""
        return np.unique(rows[np.isnan(self._map("nats", "<f4")[rows])])

    def nats(self, rows: NDArray[np.int64]) -> float:
        """Return the teacher's loss summed over the targets of the samples `rows`."""
        return float(self._map("nats", "<f4")[rows].sum(dtype=np.float64))

    def write(self, batches: Iterable[Batch], signal: Callable[[Batch], DenseTeacher], temperature: float) -> None:
        """Run the teacher on the batches and write its records."""
        index = self._map("index", "<i8")
        with self._files["bin"].open("r+b") as records, self._files["nats"].open("r+b") as nats:
            pending: list[tuple[int, float]] = []  # samples with unsynced records, and their nats
            for batch in batches:
                samples, counts = batch.indices.numpy(), batch.count_row_targets().numpy()
                numbers = record_numbers(index, samples, counts)
                found, losses = self._records(signal(batch), batch, numbers, temperature)
                ends = np.cumsum(counts)[:-1]
                for sample, part, loss in zip(samples, np.split(found, ends), np.split(losses, ends), strict=True):
                    # On a full disk this raises; writing to a memory map would kill the process.
                    records.seek(int(index[sample]) * self._record.itemsize)
                    records.write(part.tobytes())
                    pending.append((int(sample), float(loss.sum(dtype=np.float64))))
                if len(pending) >= SAMPLES_OF_A_COMMIT:
                    _commit(records, nats, pending)
            _commit(records, nats, pending)

    def signal(self, batch: Batch) -> TeacherSignal:
        """Return the teacher's distributions at the batch's targets, in the order of its flattened labels."""
        records = self._map("bin", self._record)
        samples = batch.indices.numpy()
        found = records[
            record_numbers(self._map("index", "<i8"), samples, batch.count_row_targets().numpy()[: len(samples)])
        ]
        device = batch.input_ids.device
        ids = copied_to(torch.from_numpy(found["ids"].astype(np.int32)), device).long()
        if self.settings.name == "sampled":
            return SampledTeacher(ids, copied_to(torch.from_numpy(found["entropy"].astype(np.float32)), device))
        stacked = np.column_stack([found["logs"].astype(np.float32), found["tail_log"]])
        logs = copied_to(torch.from_numpy(stacked), device)
        if not self.settings.tail:
            logs[:, -1] = -torch.inf
            logs = logs.log_softmax(1)
        return TopKTeacher(ids, logs)

    def _map(self, part: str, dtype: str | np.dtype) -> np.ndarray:
        return map_file(self._files[part], dtype)

    def _records(
        self, teacher: DenseTeacher, batch: Batch, numbers: NDArray[np.int64], temperature: float
    ) -> tuple[np.ndarray, NDArray[np.float32]]:
        """Return a batch's records (targets,) and teacher losses (targets,) in nats, computed in chunks of logits."""
        labels = batch.labels.flatten()
        kept = (labels != IGNORE_INDEX).nonzero().squeeze(1)  # (targets,)
        records, losses = np.empty(len(numbers), self._record), np.empty(len(numbers), np.float32)
        head, device = teacher.weight[: self.vocab_size], teacher.weight.device  # (V, Dt)
        hidden = teacher.at_targets(kept.to(device)).hidden  # (targets, Dt)
        labels = labels[kept].to(device)  # (targets,)
        for part, logits in logit_chunks(hidden, head, most=LOGITS_AT_A_TIME):
            log_p = logits.float().log_softmax(1)  # (C, V)
            losses[part] = -log_p.gather(1, labels[part].unsqueeze(1)).squeeze(1).cpu().numpy()
            if temperature != 1.0:
                log_p = (logits.float() / temperature).log_softmax(1)
            if self.settings.name == "sampled":
                p = log_p.exp_()
                records["ids"][part] = systematic_sample(
                    p, self.settings.n, numbers[part], self.settings.draw_seed
                ).cpu()
                records["entropy"][part] = torch.special.entr(p).sum(1).cpu()
            else:
                top, ids = log_p.topk(self.settings.k)  # (C, K)
                records["ids"][part], records["logs"][part] = ids.cpu(), top.clamp_min(SMALLEST_STORED).cpu()
                records["tail_log"][part] = log_p.scatter_(1, ids, -torch.inf).logsumexp(1).cpu()
        return records, losses


def _commit(records: BinaryIO, nats: BinaryIO, pending: list[tuple[int, float]]) -> None:
    """Sync the records to disk, then write the nats, which mark samples as complete."""
    records.flush()
    os.fsync(records.fileno())
    for sample, value in pending:
        nats.seek(4 * sample)
        nats.write(np.array(value, "<f4").tobytes())
    nats.flush()
    pending.clear()


def cache_sides(folder: Path, settings: TeacherCacheSettings, vocab_size: int) -> dict[str, CacheSide]:
    """Return both sides of a cache, under train and val.

    Validation records are top-k with the tail and k ≥ 64, since samples do not give the distillation metrics. Their
    temperature is 1, see `temperature_of`.
    """
    k = settings.k if settings.name == "topk" else 0
    of_val = replace(settings, name="topk", k=min(max(k, VALIDATION_TOKENS), vocab_size), tail=True)
    return {
        "train": CacheSide(folder, "train", settings, vocab_size),
        "val": CacheSide(folder, "val", of_val, vocab_size),
    }


def check_stored(settings: TeacherCacheSettings, loss: LossSettings) -> None:
    """Check that training records of this kind support the loss.

    Raises:
        ValueError, InputError: they do not; the message names an alternative.
    """
    if settings.name == "sampled":
        SampledTeacher.check(loss)
    elif settings.name == "topk":
        TopKTeacher.check(loss)
        if not settings.tail and loss.is_reverse_kl:
            raise InputError(
                f"loss={loss.name} is infinite where the teacher has probability 0, as with teacher_cache.tail=false.\n"
                "Use teacher_cache.tail=true, or another loss."
            )


def temperature_of(side: str, loss_temperature: float) -> float:
    """Return the temperature of a side's records: that of the loss for train, 1 for val."""
    return loss_temperature if side == "train" else 1.0


def record_numbers(
    index: NDArray[np.int64], samples: NDArray[np.int64], counts: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the record numbers of the samples (B,) with `counts` (B,) records each, concatenated."""
    firsts = index[samples].tolist()
    ranges = [np.arange(first, first + count) for first, count in zip(firsts, counts.tolist(), strict=True)]
    return np.concatenate(ranges) if ranges else np.empty(0, np.int64)


def systematic_sample(probabilities: Tensor, n: int, numbers: NDArray[np.int64], seed: int) -> Tensor:
    """Sample n tokens (C, n), in ascending order, from each row of (C, V) by systematic sampling.

    n evenly spaced points are looked up in the cumulative probabilities. Only their common shift is random, a pure
    function of (seed, record number). The expected count of a token is n · p, as with independent samples, but the
    variance is smaller: the count is n · p rounded down or up.
    """
    device, dtype = probabilities.device, widest_float(probabilities.device)
    shift = torch.from_numpy(uniforms(numbers, seed)).to(device, dtype)  # (C,)
    points = (torch.arange(n, device=device) + shift.unsqueeze(1)) / n  # (C, n)
    summed = probabilities if has_deterministic_cumsum(device) else probabilities.cpu()
    cumulative = summed.cumsum(1, dtype=dtype).to(device)
    found = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)
    return found.clamp_max(probabilities.shape[1] - 1)
