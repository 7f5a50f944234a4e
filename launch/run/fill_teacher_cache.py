"""Teacher cache: stores the teacher's distributions over the samples that this run trains on, before it starts.

Only missing samples are written: none where an earlier run had the same, and some for a longer run or another seed.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpt2lab.data.batch import Batch, Samples
from gpt2lab.data.data_order import permute
from gpt2lab.data.tokenizer import load_tokenizer, tokenizer_hash
from gpt2lab.distillation.teacher import OnlineTeacher
from gpt2lab.distillation.teacher_cache import CacheSide, cache_sides, temperature_of
from gpt2lab.errors import InputError
from gpt2lab.losses.dense_teacher import DenseTeacher
from gpt2lab.settings import DataFacts
from gpt2lab.storage.prepared_cache import cache_folder, open_growing_folder
from gpt2lab.system.device import named_dtype, resolve_device
from gpt2lab.system.terminal import Phase
from launch.config.run_spec import RunSpec
from launch.config.schema import RunConfig
from launch.run.train import set_up_process

log = logging.getLogger(__name__)

FORMAT = 3  # of the files; a new number invalidates every cache


def fill(spec: RunSpec, data: Any, facts: DataFacts) -> Path:
    """Write what is missing for this run, on one device; returns the folder.

    Jobs that need the same cache at the same time wait for the one that writes.

    Raises:
        InputError: the cache cannot be written, or k exceeds the vocabulary size.
    """
    config, vocab_size = spec.config, len(load_tokenizer(facts.tokenizer_folder))
    if config.teacher_cache.name == "topk" and config.teacher_cache.k > vocab_size:
        raise InputError(f"teacher_cache.k={config.teacher_cache.k}: the vocabulary size is only {vocab_size}.")
    cache_dir = cache_folder(config.cache_dir)
    with open_growing_folder("teachers", facts.name, _key(spec, facts), "the teacher's cache", cache_dir) as folder:
        sides = cache_sides(folder, config.teacher_cache, vocab_size)
        # Longer runs add generated text; reserved records keep the positions of those that are written.
        max_targets = config.sequences.max_new_tokens if config.sequences.name == "seqkd" else None
        requested = {
            "train": (data.train_samples, training_rows(config, len(data.train_samples)), max_targets),
            "val": (data.val_samples, data.val_rows, None),
        }
        missing: list[tuple[CacheSide, Samples, NDArray[np.int64]]] = []
        for name, (samples, rows, most) in requested.items():
            side = sides[name]
            side.create(samples, most)
            missing.append((side, samples, side.missing(rows)))
        _write(spec, missing)
    return folder


def _key(spec: RunSpec, facts: DataFacts) -> dict[str, Any]:
    """Everything that a record depends on."""
    config, cache = spec.config, spec.config.teacher_cache
    kept = (
        {"k": cache.k, "dtype": cache.dtype} if cache.name == "topk" else {"n": cache.n, "draw_seed": cache.draw_seed}
    )
    return {
        **teacher_key(spec, facts),
        "pairs": config.takes_pairs,
        "objective": config.objective.name,
        "packing": config.packing and not config.takes_pairs,  # it changes only the layout of pairs
        "temperature": config.loss.temperature,
        "mode": cache.name,
        **kept,
        "format": FORMAT,
    }


def teacher_key(spec: RunSpec, facts: DataFacts) -> dict[str, Any]:
    """Return what all stored work of a teacher depends on."""
    return {
        "teacher": spec.resolved.teacher_hash,
        "tokenizer": tokenizer_hash(load_tokenizer(facts.tokenizer_folder)),
        "data": facts.hash,
        "context": spec.config.context,
        "precision": spec.machine.precision.name,
    }


def training_rows(config: RunConfig, samples: int) -> NDArray[np.int64]:
    """Return the samples that the run's steps use: all of them from one epoch on."""
    positions = config.steps * config.global_batch_rows
    if positions >= samples:
        return np.arange(samples)
    return permute(np.arange(positions), samples, config.seed, epoch=0)


def _write(spec: RunSpec, missing: list[tuple[CacheSide, Samples, NDArray[np.int64]]]) -> None:
    total = sum(len(rows) for _, _, rows in missing)
    if not total:
        return
    log.info("the teacher reads %d sequences, once for all students", total)
    with (
        working_teacher(spec) as teacher,
        Phase("teacher cache", total, "sequences") as progress,
    ):
        device = teacher.backbone.lm.device

        def signal(batch: Batch) -> DenseTeacher:
            return teacher.signal(batch.input_ids.to(device), batch.spans_on(device))

        for side, samples, rows in missing:
            parts = batches(samples, rows, spec.machine.largest_micro_batch, progress)
            side.write(parts, signal, temperature_of(side.side, spec.config.loss.temperature))


@contextmanager
def working_teacher(spec: RunSpec) -> Iterator[OnlineTeacher]:
    """Provide the teacher on one device in the run's precision, before a Trainer exists."""
    machine = spec.machine
    set_up_process(spec)
    device, dtype = resolve_device(machine.accelerator), named_dtype(machine.precision.teacher)
    teacher = OnlineTeacher(spec.resolved.teacher, dtype)
    teacher.to(device, dtype)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        yield teacher


def batches(samples: Samples, rows: NDArray[np.int64], size: int, progress: Phase) -> Iterator[Batch]:
    """Yield the samples `rows` in micro-batches of `size`."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        yield samples.batch(part, 0)
        progress.advance(len(part))
