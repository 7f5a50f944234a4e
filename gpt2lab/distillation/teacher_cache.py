"""Teacher cache: a teacher's next-token distributions on disk, written once and read by every student of it.

    train.bin, val.bin      one record for each target of each sample, in the order of the samples; of text that is
                            still to be written each sample has a place for as many as it can get
    train.index, val.index  int64 (S + 1,): the first record of each of the S samples
    train.nats, val.nats    float32 (S,): the teacher's own loss summed over a sample's targets; NaN: not written yet
    key.json                what the records depend on; its hash is in the folder's name

A sample's records are on the disk before its nats are, so whatever kills a writer, the next one goes on where it
stopped and no reader takes half a sample for a whole one. The files have their full size from the start and are read
through a memory map; what is never needed takes no room on most file systems.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt2lab.data.batch import IGNORE_INDEX, Batch
from gpt2lab.data.data_order import uniforms
from gpt2lab.data.token_file import token_dtype
from gpt2lab.errors import InputError
from gpt2lab.losses.dense_teacher import DenseTeacher
from gpt2lab.losses.logit_chunks import logit_chunks
from gpt2lab.losses.sampled_teacher import SampledTeacher
from gpt2lab.losses.teacher_signal import TeacherSignal
from gpt2lab.losses.top_k_teacher import TopKTeacher
from gpt2lab.settings import LossSettings, TeacherCacheSettings
from gpt2lab.storage.atomic_files import flush
from gpt2lab.system.device import widest_float

LOGITS_AT_A_TIME = 2**24
SAMPLES_OF_A_COMMIT = 256
VALIDATION_ENTRIES = 64
SMALLEST_STORED = -6e4  # logarithm of a probability: what float16 can hold


class Samples(Protocol):
    """One side of the split, as the data modules give it."""

    def __len__(self) -> int: ...

    def target_counts(self, rows: NDArray[np.int64]) -> NDArray[np.int64]: ...

    def batch(self, rows: NDArray[np.int64], target_tokens: int) -> Batch: ...


def record_type(settings: TeacherCacheSettings, vocab_size: int) -> np.dtype:
    """One record. Below 65,537 vocabulary entries it takes 2 n + 2 bytes, or in float16 4 k + 4.

    Probabilities are stored as logarithms: float16 has no number between 0 and 6e-8.
    """
    number = np.dtype(settings.dtype).newbyteorder("<")
    if settings.name == "sampled":
        return np.dtype([("ids", token_dtype(vocab_size), (settings.n,)), ("entropy", "<f2")])
    ids, logs = ("ids", token_dtype(vocab_size), (settings.k,)), ("logs", number, (settings.k,))
    return np.dtype([ids, logs, ("tail_log", "<f4")])


class CacheSide:
    """The records of one side of the split.

    Args:
        folder: of the cache.
        side: train or val.
        settings: which records; with `tail` off a top-k record is read as if its entries were all there are.
        vocab_size: entries of the softmax.
    """

    def __init__(self, folder: Path, side: str, settings: TeacherCacheSettings, vocab_size: int) -> None:
        self.side = side
        self.settings = settings
        self.vocab_size = vocab_size
        self._record = record_type(settings, vocab_size)
        self._files = {part: folder / f"{side}.{part}" for part in ("bin", "index", "nats")}

    def create(self, samples: Samples, room: int | None = None) -> None:
        """Make the files, empty, unless they are there with the sizes they should have.

        Args:
            room: records for which each sample has a place, where its targets are not all known yet; None: they are.
        """
        counts = samples.target_counts(np.arange(len(samples))) if room is None else np.full(len(samples), room)
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
        """Those of the samples `rows` that are not written yet, in ascending order."""
        return np.unique(rows[np.isnan(self._map("nats", "<f4")[rows])])

    def nats(self, rows: NDArray[np.int64]) -> float:
        """The teacher's loss summed over the targets of the samples `rows`."""
        return float(self._map("nats", "<f4")[rows].sum(dtype=np.float64))

    def write(self, batches: Iterable[Batch], signal: Callable[[Batch], DenseTeacher], temperature: float) -> None:
        """Let the teacher read the batches and write what it says."""
        index = self._map("index", "<i8")
        with self._files["bin"].open("r+b") as records, self._files["nats"].open("r+b") as nats:
            pending: list[tuple[int, float]] = []  # samples whose records may not be on the disk yet, and their nats
            for batch in batches:
                samples, counts = batch.indices.numpy(), _targets_of_rows(batch)
                numbers = record_numbers(index, samples, counts)
                found, losses = self._records(signal(batch), batch, numbers, temperature)
                ends = np.cumsum(counts)[:-1]
                for sample, part, loss in zip(samples, np.split(found, ends), np.split(losses, ends), strict=True):
                    # A full disk raises here, where writing to a memory map would kill the process.
                    records.seek(int(index[sample]) * self._record.itemsize)
                    records.write(part.tobytes())
                    pending.append((int(sample), float(loss.sum(dtype=np.float64))))
                if len(pending) >= SAMPLES_OF_A_COMMIT:
                    _commit(records, nats, pending)
            _commit(records, nats, pending)

    def signal(self, batch: Batch) -> TeacherSignal:
        """Return the teacher's distributions at the batch's targets, in the order of its flattened labels."""
        records = self._map("bin", self._record)
        samples = batch.indices.cpu().numpy()
        found = records[record_numbers(self._map("index", "<i8"), samples, _targets_of_rows(batch)[: len(samples)])]
        device = batch.input_ids.device
        ids = torch.from_numpy(found["ids"].astype(np.int64)).to(device)
        if self.settings.name == "sampled":
            return SampledTeacher(ids, torch.from_numpy(found["entropy"].astype(np.float32)).to(device))
        logs = torch.from_numpy(np.column_stack([found["logs"].astype(np.float32), found["tail_log"]])).to(device)
        if not self.settings.tail:
            logs[:, -1] = -torch.inf
            logs = logs.log_softmax(1)
        p = logs.exp()  # (targets, K + 1)
        return TopKTeacher(ids, p[:, :-1], p[:, -1], logs)

    def _map(self, part: str, dtype: str | np.dtype) -> np.ndarray:
        file = self._files[part]
        return np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.empty(0, dtype)

    def _records(
        self, teacher: DenseTeacher, batch: Batch, numbers: NDArray[np.int64], temperature: float
    ) -> tuple[np.ndarray, NDArray[np.float32]]:
        """Records (targets,) of a batch and the teacher's losses (targets,) in nats, a few rows of logits at a time."""
        labels = batch.labels.flatten()
        kept = (labels != IGNORE_INDEX).nonzero().squeeze(1)  # (targets,)
        records, losses = np.empty(len(numbers), self._record), np.empty(len(numbers), np.float32)
        head, device = teacher.weight[: self.vocab_size], teacher.weight.device  # (V, Dt)
        hidden, labels = (
            teacher.at_targets(kept.to(device)).hidden,
            labels[kept].to(device),
        )  # (targets, Dt), (targets,)
        for part, logits in logit_chunks(hidden, head, most=LOGITS_AT_A_TIME):
            log_p = logits.float().log_softmax(1)  # (C, V)
            losses[part] = -log_p.gather(1, labels[part].unsqueeze(1)).squeeze(1).cpu().numpy()
            if temperature != 1.0:
                log_p = (logits.float() / temperature).log_softmax(1)
            if self.settings.name == "sampled":
                p = log_p.exp_()
                records["ids"][part] = draws(p, self.settings.n, numbers[part], self.settings.draw_seed).cpu()
                records["entropy"][part] = torch.special.entr(p).sum(1).cpu()
            else:
                top, ids = log_p.topk(self.settings.k)  # (C, K)
                records["ids"][part], records["logs"][part] = ids.cpu(), top.clamp_min(SMALLEST_STORED).cpu()
                records["tail_log"][part] = log_p.scatter_(1, ids, -torch.inf).logsumexp(1).cpu()
        return records, losses


def _targets_of_rows(batch: Batch) -> NDArray[np.int64]:
    """(B,)"""
    return (batch.labels != IGNORE_INDEX).sum(1).cpu().numpy()


def _commit(records: BinaryIO, nats: BinaryIO, pending: list[tuple[int, float]]) -> None:
    """Mark samples as written, once their records are on the disk."""
    records.flush()
    os.fsync(records.fileno())
    for sample, value in pending:
        nats.seek(4 * sample)
        nats.write(np.array(value, "<f4").tobytes())
    nats.flush()
    pending.clear()


def cache_sides(folder: Path, settings: TeacherCacheSettings, vocab_size: int) -> dict[str, CacheSide]:
    """Both sides of a cache, under train and val.

    Validation compares whole distributions, which draws cannot give, so its records are top-k with their tail, of 64
    entries or more. It compares them at temperature 1, whatever the loss's is; see `temperature_of`.
    """
    k = settings.k if settings.name == "topk" else 0
    of_val = replace(settings, name="topk", k=min(max(k, VALIDATION_ENTRIES), vocab_size), tail=True)
    return {
        "train": CacheSide(folder, "train", settings, vocab_size),
        "val": CacheSide(folder, "val", of_val, vocab_size),
    }


def check_stored(settings: TeacherCacheSettings, loss: LossSettings) -> None:
    """Check that training records of this kind can serve the loss.

    Raises:
        ValueError: the message names the losses that they serve.
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
    """At which a side's records are taken: training reads the loss's, validation tells the teacher as it is."""
    return loss_temperature if side == "train" else 1.0


def record_numbers(
    index: NDArray[np.int64], samples: NDArray[np.int64], counts: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Numbers of all records of the samples (B,), which have `counts` (B,) each, one sample after the other."""
    firsts = index[samples].tolist()
    ranges = [np.arange(first, first + count) for first, count in zip(firsts, counts.tolist(), strict=True)]
    return np.concatenate(ranges) if ranges else np.empty(0, np.int64)


def draws(probabilities: Tensor, n: int, numbers: NDArray[np.int64], seed: int) -> Tensor:
    """n draws from each row of (C, V), as entries (C, n) in ascending order.

    Systematic sampling: the n points that meet the cumulated probabilities are evenly spaced, and only their common
    shift is random, a pure function of (seed, number of the record). An entry is expected n · p times, as with
    independent draws, and the number of times it comes varies less: it is n · p rounded down or up.
    """
    device, dtype = probabilities.device, widest_float(probabilities.device)
    shift = torch.from_numpy(uniforms(numbers, seed)).to(device, dtype)  # (C,)
    points = (torch.arange(n, device=device) + shift.unsqueeze(1)) / n  # (C, n)
    cumulated = probabilities.cumsum(1, dtype=dtype)
    found = torch.searchsorted(cumulated, points * cumulated[:, -1:], right=True)
    return found.clamp_max(probabilities.shape[1] - 1)
