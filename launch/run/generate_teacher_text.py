"""Teacher text: with sequences=seqkd the teacher generates the training text once, before students are trained."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gpt2lab.data.tokenizer import load_tokenizer
from gpt2lab.distillation.generation_batches import TextGenerator
from gpt2lab.distillation.init_from_teacher import CALIBRATION_SAMPLES
from gpt2lab.distillation.teacher_generations import TeacherGenerations
from gpt2lab.model.student_shape import TEACHER_LAYERS
from gpt2lab.settings import DataFacts
from gpt2lab.storage.prepared_cache import cache_folder, content_hash, open_growing_folder
from gpt2lab.system.terminal import Phase
from launch.config.run_spec import RunSpec
from launch.config.schema import RunConfig
from launch.run.fill_teacher_cache import batches, teacher_key, training_rows, working_teacher

log = logging.getLogger(__name__)

FORMAT = 1  # of the files; a new number invalidates every text


def write(spec: RunSpec, data: Any, facts: DataFacts) -> Path:
    """Generate what is missing for this run, on one device; returns the folder.

    Raises:
        InputError: it cannot be written.
    """
    cache_dir = cache_folder(spec.config.cache_dir)
    with open_growing_folder("teacher_texts", facts.name, _key(spec, facts), "the teacher's text", cache_dir) as folder:
        text = _opened(spec.config, folder, data, facts)
        text.create()
        rows = training_rows(spec.config, len(text))
        if spec.resolved.init == TEACHER_LAYERS:
            rows = np.union1d(rows, data.calibration_rows(CALIBRATION_SAMPLES))
        missing = text.missing(rows)
        if not len(missing):
            return folder
        log.info("the teacher writes %d sequences, once for all students", len(missing))
        with (
            working_teacher(spec) as teacher,
            Phase("teacher text", len(missing), "sequences") as progress,
        ):
            parts = batches(data.train_samples, missing, spec.machine.largest_micro_batch, progress)
            text.write(parts, teacher.backbone.lm)
    return folder


def replace_training_text(config: RunConfig, folder: Path, data: Any, facts: DataFacts) -> DataFacts:
    """Replace the training samples by the text that the teacher generated; returns the facts of that."""
    text = _opened(config, folder, data, facts)
    data.train_samples = text
    targets = int(text.target_counts(training_rows(config, len(text))).sum())
    return replace(facts, hash=content_hash([facts.hash, folder.name])[:16], train_tokens=targets)


def _opened(config: RunConfig, folder: Path, data: Any, facts: DataFacts) -> TeacherGenerations:
    tokenizer, sequences = load_tokenizer(facts.tokenizer_folder), config.sequences
    generator = TextGenerator(
        context=config.context,
        max_new_tokens=sequences.max_new_tokens,
        temperature=sequences.gen_temperature,
        end_of_text=tokenizer.eos_token_id,
        vocab_size=len(tokenizer),
        seed=sequences.draw_seed,
    )
    return TeacherGenerations(folder, data.train_samples, generator)


def _key(spec: RunSpec, facts: DataFacts) -> dict[str, Any]:
    """Everything that the text depends on."""
    sequences = spec.config.sequences
    return {
        **teacher_key(spec, facts),
        "max_new_tokens": sequences.max_new_tokens,
        "gen_temperature": sequences.gen_temperature,
        "draw_seed": sequences.draw_seed,
        "format": FORMAT,
    }
