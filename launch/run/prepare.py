"""Prepare: makes the data of a resolved run, and what follows from them; once, in the process that starts the run."""

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpt2lab.reports import side_files
from gpt2lab.settings import DataFacts
from launch import logging_setup
from launch.checks import baseline, checks
from launch.config.run_spec import Prepared, PreparedSpec, RunSpec
from launch.config.schema import RunConfig, steps_of_epochs, with_size_defaults, with_steps
from launch.distributed import multi_node
from launch.run import auto_settings, disk_space, memory_limit, resolve, resume
from launch.run.resume import Existing

log = logging.getLogger(__name__)

BENCHMARKS = "callbacks.benchmarks.Benchmarks"

MOST_PASSES = (
    16  # after four a pass is worth less than new text, after 16 little (Muennighoff et al., arXiv 2305.16264)
)


def prepare_data(spec: RunSpec, existing: Existing | None) -> tuple[Any, DataFacts, PreparedSpec]:
    """Prepare the text, and let the teacher generate text or fill its cache where the run trains on that.

    Args:
        existing: the run in an existing directory, which keeps its choices.

    Returns:
        Data module, facts of its data, and the specification with all that follows from them.

    Raises:
        InputError: data, teacher, tokenizer and disk do not fit the run.
    """
    started = time.monotonic()
    data, facts, spec = prepare_text(spec, existing)
    prepared = spec.prepared
    if spec.config.task_name == "distill":
        with memory_limit.convert_out_of_memory(spec):
            facts, prepared = _prepare_teacher(spec, prepared, data, facts)
    prepared = replace(prepared, seconds=round(time.monotonic() - started, 2))
    return data, facts, replace(spec, prepared=prepared)


def prepare_text(spec: RunSpec, existing: Existing | None) -> tuple[Any, DataFacts, PreparedSpec]:
    """Prepare the text and check that the run fits it; arguments, results and errors as for `prepare_data`."""
    from launch.run import build
    from launch.run.plan_report import planned_memory, warn_of_little_memory, warn_of_long_validation

    logging_setup.silence_libraries()  # of Lightning, which the imports above bring
    stored = existing.stored.prepared if existing else None
    is_resumed = existing is not None and existing.checkpoint is not None
    if existing is not None and is_resumed:
        side_files.repair(existing.folder)
    _check_benchmarks(spec.config)
    data = build.data_module(spec)
    facts = data.prepare()
    resume.check_data(existing, facts.hash)
    spec = _with_steps(spec, len(data.train_samples), existing)
    _warn_of_repeated_data(spec.config, len(data.train_samples))
    vocab_size = resolve.vocabulary(spec, facts)
    checks.check_heads(spec.resolved.model.n_embd or 0, spec.resolved.model.n_head or 1)
    compiles = auto_settings.compiles  # a resumed run is perhaps on another machine than before
    compile_head = compiles(stored.compile_head) if stored else auto_settings.compiling_the_head_pays(spec)
    target_share = facts.val_tokens / (len(data.val_rows) * spec.config.context)
    plan = planned_memory(spec, vocab_size, compile_head, target_share)
    prepared = Prepared(
        data_hash=facts.hash,
        vocab_size=vocab_size,
        compile=compiles(stored.compile) if stored else auto_settings.compile_pays(spec, vocab_size),
        compile_head=compile_head,
        baseline_loss=stored.baseline_loss
        if stored and is_resumed
        else baseline.baseline_loss(spec.config, spec.resolved.model, facts),
        planned_memory={"process": plan.process, "peak": plan.peak},
    )
    disk_space.check(spec, vocab_size, existing.folder if existing else None)
    warn_of_little_memory(spec, plan)
    warn_of_long_validation(spec, vocab_size, int(data.val_samples.numbered_tokens()[1].sum()))
    return data, facts, PreparedSpec(spec.config, spec.resolved, prepared)


def _check_benchmarks(config: RunConfig) -> None:
    """Load the data of callbacks=benchmarks, so that a task without data ends the run before anything is prepared.

    Raises:
        InputError: an unknown task, or its data cannot be loaded.
    """
    node = config.callbacks.get("benchmarks")
    if node is not None and node["_target_"] == BENCHMARKS:
        from gpt2lab.evaluation.lm_eval_harness import find_tasks

        place = "callbacks.benchmarks"
        find_tasks(",".join(node["tasks"]), str(node.get("path") or ""), f"{place}.tasks", f"{place}.path")


def _with_steps(spec: RunSpec, samples: int, existing: Existing | None) -> RunSpec:
    """Return the run with the steps of its epochs, which schedule, plan and compile then follow.

    Args:
        samples: of the training data, each of which an epoch uses once.

    Raises:
        InputError: the warm-up does not fit, or a resumed run has completed more.
    """
    config = spec.config
    if config.epochs is None:
        return spec
    steps = steps_of_epochs(config, samples)
    config = with_steps(config, steps)
    if existing is None or existing.checkpoint is None:
        config = with_size_defaults(config, spec.resolved.model, spec.machine.accelerator == "gpu")  # the warm-up
    log.info("epochs=%g: %d steps of %d of %d sequences", config.epochs, steps, config.global_batch_rows, samples)
    checks.check_schedule(config)
    if existing is None:
        checks.check_profiled_steps(config)
    else:
        resume.check_steps(existing, config)
    return replace(spec, config=config)


def _warn_of_repeated_data(config: RunConfig, samples: int) -> None:
    """Log a warning where the default number of steps repeats the training data too often."""
    passes = config.steps * config.global_batch_rows / samples
    if "steps" in config.invocation.auto_keys and passes > MOST_PASSES:
        log.warning(
            "steps=%d, the default for this size, are %.0f passes over the training data. "
            "Give more data, fewer steps, or early_stop_patience= with export=best.",
            config.steps,
            passes,
        )


def _prepare_teacher(spec: RunSpec, prepared: Prepared, data: Any, facts: DataFacts) -> tuple[DataFacts, Prepared]:
    """Let the teacher generate or store what it does once for all students; returns the facts of that text."""
    started = time.monotonic()
    if spec.config.sequences.name == "seqkd":
        from launch.run import generate_teacher_text

        folder = generate_teacher_text.write(spec, data, facts)
        facts = generate_teacher_text.replace_training_text(spec.config, folder, data, facts)
        prepared = replace(prepared, teacher_text=str(folder))
    if spec.config.teacher_cache.name != "none":
        from launch.run import fill_teacher_cache

        prepared = replace(prepared, teacher_cache=str(fill_teacher_cache.fill(spec, data, facts)))
    return facts, replace(prepared, teacher_seconds=round(time.monotonic() - started, 2))


def prepared_data(spec: PreparedSpec) -> tuple[Any, DataFacts]:
    """Return data module and facts of its data on a rank, whose run another process has prepared.

    Raises:
        InputError: this machine's data are others.
    """
    from launch.run import build

    logging_setup.silence_libraries()
    data = build.data_module(spec)
    facts = data.prepare()
    multi_node.check_data(spec, facts.hash)
    if spec.prepared.teacher_text:
        from launch.run import generate_teacher_text

        folder = Path(spec.prepared.teacher_text)
        facts = generate_teacher_text.replace_training_text(spec.config, folder, data, facts)
    return data, facts
