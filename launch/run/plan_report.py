"""Plan: the memory, time and disk that a run would need, for plan=true. Allocates nothing of the run's size."""

import io
import logging
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gpt2lab.data.token_file import token_dtype
from gpt2lab.errors import InputError
from gpt2lab.storage.model_folder import parameter_count
from gpt2lab.system.device import resident_memory_bytes
from launch.checks import sharding
from launch.config import size_defaults
from launch.config.run_spec import RunSpec
from launch.config.schema import RunConfig, explain_sizes, value_of
from launch.config.unused_keys import given_keys
from launch.memory.memory_options import memory_options
from launch.memory.memory_plan import MemoryPlan, memory_plan
from launch.memory.memory_terms import RunSizes, trained_parameters
from launch.memory.run_sizes import expected_vocabulary, rank_memory_limit, run_sizes
from launch.memory.step_timing import Speed, measure_speed
from launch.run import auto_settings, disk_space, run_cost
from launch.run.build import data_module
from launch.run.plan_data import PreparedData, find_prepared, with_counted_steps

log = logging.getLogger(__name__)

WIDTH = 110
LONG_VALIDATION, LONG_GPU_VALIDATION = {"cpu": 3e11}, 3e15  # FLOP that take some ten seconds
PHASES = {  # of RunCost → name of its row
    "prepare": "preparation",
    "train": "training",
    "validate": "validation",
    "sample": "samples",
    "save": "saving",
    "export": "export",
}
SECONDS = ((86_400, "days"), (3_600, "hours"), (60, "minutes"), (1, "seconds"))


def planned_memory(spec: RunSpec, vocab_size: int, compiled_head: bool, target_share: float) -> MemoryPlan:
    """Return the memory of a run whose process is like this one.

    Args:
        target_share: share of positions with a target in pairs.
    """
    sizes = run_sizes(spec.config, spec.resolved, spec.machine, vocab_size, compiled_head, target_share)
    return memory_plan(sizes, resident_memory_bytes())


def warn_of_little_memory(spec: RunSpec, plan: MemoryPlan) -> None:
    """Log a warning where the run is expected to take more memory than is free."""
    room = rank_memory_limit(spec.machine, auto_settings.free_memory(spec.config), plan.process)
    if room is not None and plan.peak > room:
        log.warning(
            "This run takes about %.1f GB of each device, and %.1f GB are free; plan=true shows what saves memory.",
            plan.peak / 1e9,
            room / 1e9,
        )


def warn_of_long_validation(spec: RunSpec, vocab_size: int, split: int) -> None:
    """Log a warning where validation takes long, and more compute than training.

    Args:
        split: tokens of the validation split.
    """
    config, accelerator = spec.config, spec.machine.accelerator
    sizes = run_sizes(config, spec.resolved, spec.machine, vocab_size)
    phases = run_cost.run_cost(spec, sizes, disk_space.run_files(spec, vocab_size), split).phases
    train, validate = phases["train"], phases["validate"]
    is_limited = config.trainer.get("fast_dev_run") or config.trainer.get("limit_val_batches")
    if is_limited or validate.flops < max(train.flops, LONG_VALIDATION.get(accelerator, LONG_GPU_VALIDATION)):
        return
    log.warning(
        "Validation takes %.1f times the compute of training (%s).\n%s",
        validate.flops / train.flops,
        validate.text,
        run_cost.LESS_VALIDATION,
    )


def plan_report(spec: RunSpec) -> str:
    """Return the whole plan of a resolved run, as text for the terminal.

    Raises:
        InputError: the named tokenizer cannot be loaded.
    """
    data = find_prepared(spec)
    spec, steps_of = with_counted_steps(spec, data)
    config, machine = spec.config, spec.machine
    vocab_size, compiled_head = expected_vocabulary(config, spec.resolved), auto_settings.compiling_the_head_pays(spec)
    sizes = run_sizes(config, spec.resolved, machine, vocab_size, compiled_head)
    plan = memory_plan(sizes, resident_memory_bytes())
    free = auto_settings.free_memory(config)
    room = rank_memory_limit(machine, free, plan.process)
    fits = room is None or plan.peak <= room
    if config.plan_memory is not None:
        speed = Speed(None, "the machine is not this one")
    else:
        speed = measure_speed(sizes, spec, free) if fits else Speed(None, "the run does not fit")
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
    console.print(_facts(spec, sizes, vocab_size))
    console.print(_defaults(spec, vocab_size, steps_of))
    console.print(_memory(spec, sizes, plan, room))
    console.print(_memory_options(spec, sizes, plan))
    console.print(_time_and_disk(spec, sizes, vocab_size, speed, data))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=None, title_justify="left", title_style="", pad_edge=False, padding=(0, 3, 0, 0))
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number == 1 else "left")
    return table


def _facts(spec: RunSpec, sizes: RunSizes, vocab_size: int) -> Table:
    config, inputs, machine = spec.config, spec.resolved, spec.machine
    table = _table("\nRun", "", "", "")
    rows = config.global_batch_rows
    up_to = "up to " if inputs.tokenizer.kind == "bpe" and not inputs.init_names_weights else ""
    total = parameter_count({**vars(inputs.model), "vocab_size": vocab_size})
    table.add_row(
        "task", config.task_name, f"model {inputs.model_name}, data {config.groups['data']}, init {inputs.init}"
    )
    table.add_row("parameters", f"{total:,}", f"vocabulary of {up_to}{vocab_size:,}")
    table.add_row(
        "trained", f"{trained_parameters(sizes):,}", f"by {config.optimizer.name} in {machine.precision.name}"
    )
    if sizes.teacher or sizes.cached_teacher:
        usage = "runs at every step" if sizes.teacher else f"read once (teacher_cache={config.teacher_cache.name})"
        shape = sizes.teacher or sizes.cached_teacher
        table.add_row("teacher", f"{parameter_count(vars(shape)):,}", f"parameters, {usage}: {inputs.teacher}")
    table.add_row("steps", f"{config.steps:,}", f"of {rows} sequences of {config.context} tokens")
    devices = f"{machine.world_size} × {machine.accelerator}"
    split = f"micro_batch={machine.micro_batch}, {machine.accumulate} of them in a step on each device"
    strategy = "single device" if machine.strategy == "auto" else f"strategy={machine.strategy}"
    table.add_row("devices", devices, f"{strategy}; {split}")
    return table


def _defaults(spec: RunSpec, vocab_size: int, steps_of: str) -> Table:
    """Return the keys whose default follows the size of the model, each with where its value comes from.

    Args:
        steps_of: how the steps of epochs were found; "" without epochs.
    """
    config, table = spec.config, _table("\nDefaults by size of the model", "", "", "from")
    by_size = explain_sizes(config, spec.resolved.model, spec.machine.accelerator == "gpu")
    sources = {key: source for key, (_, source) in by_size.items()}
    if steps_of:
        sources["steps"] = steps_of
    for key in size_defaults.RULES:
        if key == "batch_tokens" and config.takes_pairs:
            table.add_row("batch_sequences", f"{config.batch_sequences:,}", _given(config, "batch_sequences"))
            continue
        value = value_of(config, key)
        text = f"{value:,}" if isinstance(value, int) else "null" if value is None else f"{value:g}"
        table.add_row(key, text, sources.get(key) or _given(config, key))
    is_compiled = auto_settings.compile_pays(spec, vocab_size)
    gain = "saves time within this run" if is_compiled else "would take longer than it saves"
    source = _given(config, "compile") if config.compile != size_defaults.AUTO else f"size, steps and device: {gain}"
    table.add_row("compile", str(is_compiled).lower(), source)
    return table


def _given(config: RunConfig, key: str) -> str:
    """Return where the value of a key comes from that does not follow the size."""
    if key in given_keys(config.invocation.overrides):
        return "given"
    experiment = config.groups.get("experiment", "none")
    return "conf/" if experiment == "none" else f"conf/, experiment={experiment}"


def _memory(spec: RunSpec, sizes: RunSizes, plan: MemoryPlan, room: int | None) -> Table:
    table = _table("\nMemory of each device", "", "GB", "")
    notes = {
        "weights": "with what is gathered of the other devices" if sizes.sharded else "",
        "activations": f"of one micro-batch of {sizes.rows} × {sizes.length} tokens"
        + (", recomputed block by block" if sizes.checkpointing else ""),
        "LM head temporaries": "the chunk of logits that is worked on",
        "generation": "key-value cache and logits of samples, generated answers and on-policy text",
        "checkpoint copy": "which is written while training continues",
        "export": "fp32 copies of the weights while a checkpoint is written and verified",
        "teacher weights": "a device's part of its blocks, and two whole ones" if sizes.sharded_teacher else "",
    }
    for name, size in plan.parts.items():
        if size:
            table.add_row(name, _gigabytes(size), notes.get(name, ""))
    if plan.process:
        table.add_row("process", _gigabytes(plan.process), "Python and its libraries, before there is a model")
        table.add_row("between", _gigabytes(plan.fragmentation), "freed memory that fits no other tensor, libraries")
    table.add_row("peak", _gigabytes(plan.peak), f"in the phase {plan.largest_phase}; not all parts are there at once")
    if room is None:
        table.add_row("free", "?", "not reported by this device")
    else:
        verdict = "it fits" if plan.peak <= room else "IT DOES NOT FIT: see what would save memory"
        table.add_row("free", _gigabytes(room), verdict)
    best = auto_settings.suggested_micro_batch(spec)
    table.add_row("micro_batch", str(best), "suggested: the largest that fits and still gains speed")
    return table


def _memory_options(spec: RunSpec, sizes: RunSizes, plan: MemoryPlan) -> Table:
    table = _table("\nWhat would change the peak", "set", "saves GB", "costs")
    may_shard = sharding.may_shard(spec.config, spec.machine.accelerator, spec.machine.precision)
    for option in memory_options(sizes, plan, may_shard):
        table.add_row(option.key, f"{(plan.peak - option.peak) / 1e9:+.2f}", option.cost)
    return table


def _time_and_disk(spec: RunSpec, sizes: RunSizes, vocab_size: int, speed: Speed, data: PreparedData | None) -> Table:
    config, table = spec.config, _table("\nTime and disk", "", "", "")
    files = disk_space.run_files(spec, vocab_size)
    validation = (data.validation_tokens, 0) if data is not None else _split_tokens(spec)
    for row in _cost_rows(spec, sizes, files, speed, validation):
        table.add_row(*row)
    kept = f"{files.kept} of {_on_disk(files.checkpoint)} and the exported model"
    table.add_row("checkpoints", _on_disk(files.left), f"{kept}; up to {_on_disk(files.most)} on the way")
    table.add_row("data", *_data_on_disk(spec, vocab_size))
    if not config.takes_pairs:
        table.add_row("overlap", *_overlap(data))
    if sizes.cached_teacher:
        table.add_row("teacher cache", _on_disk(_cache_bytes(config, vocab_size)), "at most, for training")
    return table


def _cost_rows(
    spec: RunSpec, sizes: RunSizes, files: disk_space.RunFiles, speed: Speed, validation: tuple[int | None, int]
) -> Iterator[tuple[str, str, str]]:
    """Yield the rows of speed, of the time of each phase, and of the share of the compute that trains.

    Args:
        validation: as from `run_cost.split_tokens`.
    """
    rate = (speed.tokens_per_second or 0.0) * spec.machine.world_size
    yield "tokens/s", f"{rate:,.0f}" if rate else "?", speed.note if rate else f"not measured: {speed.note}"
    try:
        cost = run_cost.run_cost(spec, sizes, files, *validation)
    except InputError as error:
        yield "time", "?", str(error)
        return
    seconds = cost.seconds(rate, speed.decoding_seconds) if rate else {}
    for phase, work in cost.phases.items():
        yield PHASES[phase], _duration(seconds[phase]) if rate else "?", work.text
    if rate:
        limit = spec.config.trainer.get("max_time")
        yield "in all", _duration(sum(seconds.values())), f"trainer.max_time={limit} may end it before" if limit else ""
    yield "compute", f"{cost.training_share:.1%}", "of it trains; the rest validates and generates text"
    if cost.training_share < 0.5:
        yield "", "", run_cost.LESS_VALIDATION


def _split_tokens(spec: RunSpec) -> tuple[int | None, int]:
    try:
        return run_cost.split_tokens(spec)
    except InputError:  # a plan may be made where the data are not
        return None, 0


def _data_on_disk(spec: RunSpec, vocab_size: int) -> tuple[str, str]:
    config = spec.config
    folder = Path(config.path).expanduser() if config.path else None
    if config.data.get("source") == "bin" and folder is not None:
        return _on_disk(sum(file.stat().st_size for file in folder.glob("*.bin"))), "used in place"
    try:
        text = 0 if config.takes_pairs else data_module(spec).text_bytes()
    except InputError as error:  # a plan may be made where the data are not
        return "?", str(error).splitlines()[0]
    if not text:
        return "?", "made once in cache_dir; known when they are"
    size = text // run_cost.BYTES_OF_A_TOKEN * token_dtype(vocab_size).itemsize
    return _on_disk(size), f"about, for {_on_disk(text)} of text; made once in cache_dir"


def _overlap(data: PreparedData | None) -> tuple[str, str]:
    """Share of the validation text's 13-grams that occur in the training text, where the data are prepared."""
    share = data.overlap if data is not None else None
    known = "" if share is not None else "; computed when the data are prepared"
    return "?" if share is None else f"{share:.1%}", f"of the validation text's 13-grams occur in training text{known}"


def _cache_bytes(config: RunConfig, vocab_size: int) -> int:
    from gpt2lab.distillation.teacher_cache import record_type

    positions = config.steps * config.global_batch_rows * config.context
    return positions * record_type(config.teacher_cache, vocab_size).itemsize


def _on_disk(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f}"


def _duration(seconds: float) -> str:
    length, name = next((unit for unit in SECONDS if seconds >= 2 * unit[0]), SECONDS[-1])
    return f"{seconds / length:.1f} {name}"
