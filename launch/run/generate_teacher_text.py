"""Teacher writing: with sequences=seqkd the teacher writes what the students will read, before they are trained."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gpt2lab.data.tokenizer import load_tokenizer, tokenizer_hash
from gpt2lab.distillation.generation_batches import Writer
from gpt2lab.distillation.init_from_teacher import CALIBRATION_SAMPLES
from gpt2lab.distillation.teacher_generations import TeacherText
from gpt2lab.model.student_shape import TEACHER_LAYERS
from gpt2lab.settings import DataFacts
from gpt2lab.storage.prepared_cache import cache_folder, content_hash, grown
from launch.config.schema import Config
from launch.run.auto_settings import largest_micro_batch
from launch.run.fill_teacher_cache import batches, training_rows, working_teacher

log = logging.getLogger(__name__)

FORMAT = 1  # of the files; another number makes every text anew


def write(settings: Config, data: Any, facts: DataFacts) -> None:
    """Write what is missing for this run, on one device, and record the folder.

    Raises:
        InputError: it cannot be written.
    """
    cache_dir = cache_folder(settings.cache_dir)
    with grown("teacher_texts", facts.name, _key(settings, facts), "the teacher's text", cache_dir) as folder:
        settings.record.teacher_text = str(folder)
        text = _opened(settings, data, facts)
        text.create()
        rows = training_rows(settings, len(text))
        if settings.init == TEACHER_LAYERS:
            rows = np.union1d(rows, data.calibration_rows(CALIBRATION_SAMPLES))
        missing = text.missing(rows)
        if not len(missing):
            return
        log.info("the teacher writes %d sequences, once for all students", len(missing))
        with (
            working_teacher(settings) as teacher,
            tqdm(total=len(missing), desc="teacher writes", unit="sequence", disable=None) as progress,
        ):
            parts = batches(data.train_samples, missing, largest_micro_batch(settings), progress)
            text.write(parts, teacher.backbone.lm)


def put_in(settings: Config, data: Any, facts: DataFacts) -> DataFacts:
    """Let the data's training set be what the teacher wrote; returns the facts of that."""
    text = _opened(settings, data, facts)
    data.train_samples = text
    targets = int(text.target_counts(training_rows(settings, len(text))).sum())
    return replace(
        facts, hash=content_hash([facts.hash, Path(settings.record.teacher_text).name])[:16], train_tokens=targets
    )


def _opened(settings: Config, data: Any, facts: DataFacts) -> TeacherText:
    tokenizer, sequences = load_tokenizer(facts.tokenizer_folder), settings.sequences
    writer = Writer(
        context=settings.context,
        max_new_tokens=sequences.max_new_tokens,
        temperature=sequences.gen_temperature,
        end_of_text=tokenizer.eos_token_id,
        entries=len(tokenizer),
        seed=sequences.draw_seed,
    )
    return TeacherText(Path(settings.record.teacher_text), data.train_samples, writer)


def _key(settings: Config, facts: DataFacts) -> dict[str, Any]:
    """Everything that the text depends on."""
    sequences = settings.sequences
    return {
        "teacher": settings.record.teacher_hash,
        "tokenizer": tokenizer_hash(load_tokenizer(facts.tokenizer_folder)),
        "data": facts.hash,
        "context": settings.context,
        "max_new_tokens": sequences.max_new_tokens,
        "gen_temperature": sequences.gen_temperature,
        "draw_seed": sequences.draw_seed,
        "precision": settings.precision,
        "format": FORMAT,
    }
