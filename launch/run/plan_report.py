"""Plan: what a run would need and do, as the terminal shows it (plan=true). Nothing of the run's size is allocated."""

import io
import logging
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gpt2lab.data.token_file import token_dtype
from gpt2lab.errors import InputError
from gpt2lab.storage.model_folder import parameters_of
from gpt2lab.system.device import resident_memory_bytes
from launch.checks import sharding
from launch.config.schema import Config
from launch.memory.memory_options import knobs
from launch.memory.memory_plan import MemoryPlan, memory_plan
from launch.memory.memory_terms import RunSizes, trained_parameters
from launch.memory.run_sizes import expected_vocabulary, room_of_a_device, run_sizes
from launch.memory.step_timing import Speed, measured_speed
from launch.run import auto_settings, disk_space
from launch.run.build import data_module

log = logging.getLogger(__name__)

WIDTH = 110
BYTES_OF_A_TOKEN = 3  # of text, at least: 3.0 to 4.5 of English and of source code, with 4,096 to 50,257 entries
SECONDS = ((86_400, "days"), (3_600, "hours"), (60, "minutes"), (1, "seconds"))


def planned_memory(config: Config, vocab_size: int) -> MemoryPlan:
    """Of a configuration whose automatic choices are settled, run by a process like this one."""
    return memory_plan(run_sizes(config, vocab_size), resident_memory_bytes())


def note_planned_memory(config: Config, vocab_size: int) -> None:
    """Put what the run is expected to take into its record, for its report; warn where there is less."""
    plan = planned_memory(config, vocab_size)
    config.record.planned_memory = {"process": plan.process, "peak": plan.peak}
    room = room_of_a_device(config, auto_settings.free_memory(config), plan.process)
    if room is not None and plan.peak > room:
        log.warning(
            "This run takes about %.1f GB of each device, and %.1f GB are free; plan=true shows what saves memory.",
            plan.peak / 1e9,
            room / 1e9,
        )


def plan_of(config: Config) -> str:
    """The whole plan of a resolved configuration whose automatic choices are settled.

    Raises:
        InputError: the tokenizer that is named cannot be had.
    """
    vocab_size = expected_vocabulary(config)
    config.record.compile_head = auto_settings.compiling_the_head_pays(config)
    plan, sizes = planned_memory(config, vocab_size), run_sizes(config, vocab_size)
    free = auto_settings.free_memory(config)
    room = room_of_a_device(config, free, plan.process)
    fits = room is None or plan.peak <= room
    if config.plan_memory is not None:
        speed = Speed(None, "the machine is not this one")
    else:
        speed = measured_speed(sizes, config, free) if fits else Speed(None, "the run does not fit")
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
    console.print(_facts(config, sizes, vocab_size))
    console.print(_memory(config, sizes, plan, room))
    console.print(_knobs(config, sizes, plan))
    console.print(_time_and_disk(config, sizes, vocab_size, speed))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=None, title_justify="left", title_style="", pad_edge=False, padding=(0, 3, 0, 0))
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number == 1 else "left")
    return table


def _facts(config: Config, sizes: RunSizes, vocab_size: int) -> Table:
    groups, ranks = config.record.groups, max(config.record.world_size, 1)
    table = _table("\nRun", "", "", "")
    rows = config.rows_of_a_step
    up_to = "up to " if config.tokenizer.kind == "bpe" and not config.init_names_weights else ""
    total = parameters_of({**vars(config.model), "vocab_size": vocab_size})
    table.add_row("task", config.task_name, f"model {groups['model']}, data {groups['data']}, init {config.init}")
    table.add_row("parameters", f"{total:,}", f"vocabulary of {up_to}{vocab_size:,}")
    table.add_row("trained", f"{trained_parameters(sizes):,}", f"by {config.optimizer.name} in {config.precision}")
    if sizes.teacher or sizes.reading_teacher:
        asked = "asked at every step" if sizes.teacher else f"read once (teacher_cache={config.teacher_cache.name})"
        shape = sizes.teacher or sizes.reading_teacher
        table.add_row("teacher", f"{parameters_of(vars(shape)):,}", f"parameters, {asked}: {config.teacher}")
    table.add_row("steps", f"{config.steps:,}", f"of {rows} sequences of {config.context} tokens")
    devices = f"{ranks} × {config.accelerator}"
    split = f"micro_batch={config.micro_batch}, {config.record.accumulate} of them in a step on each device"
    table.add_row("devices", devices, f"{_strategy(config)}; {split}")
    return table


def _strategy(config: Config) -> str:
    return "single device" if config.strategy == "auto" else f"strategy={config.strategy}"


def _memory(config: Config, sizes: RunSizes, plan: MemoryPlan, room: int | None) -> Table:
    table = _table("\nMemory of each device", "", "GB", "")
    notes = {
        "weights": "with what is gathered of the other devices" if sizes.sharded else "",
        "activations": f"of one micro-batch of {sizes.rows} × {sizes.length} tokens"
        + (", recomputed block by block" if sizes.checkpointing else ""),
        "LM head": "its gradients, and the chunk of logits that is worked on",
        "teacher weights": "a device's part of its blocks, and two whole ones" if sizes.sharded_teacher else "",
    }
    for name, size in plan.parts.items():
        if size:
            table.add_row(name, _gigabytes(size), notes.get(name, ""))
    if plan.process:
        table.add_row("process", _gigabytes(plan.process), "Python and its libraries, before there is a model")
        table.add_row(
            "between", _gigabytes(plan.between), "freed memory that fits nothing else, libraries loaded later"
        )
    table.add_row("peak", _gigabytes(plan.peak), f"in the phase {plan.fullest}; not all parts are there at once")
    if room is None:
        table.add_row("free", "?", "this device does not say")
    else:
        says = "it fits" if plan.peak <= room else "IT DOES NOT FIT: see what would save memory"
        table.add_row("free", _gigabytes(room), says)
    best = auto_settings.suggested_micro_batch(config)
    table.add_row("micro_batch", str(best), "suggested: the largest that fits and still gains speed")
    return table


def _knobs(config: Config, sizes: RunSizes, plan: MemoryPlan) -> Table:
    table = _table("\nWhat would change the peak", "set", "saves GB", "costs")
    for knob in knobs(sizes, plan, sharding.may_shard(config)):
        table.add_row(knob.key, f"{(plan.peak - knob.peak) / 1e9:+.2f}", knob.price)
    return table


def _time_and_disk(config: Config, sizes: RunSizes, vocab_size: int, speed: Speed) -> Table:
    table = _table("\nTime and disk", "", "", "")
    if speed.tokens_per_second is None:
        table.add_row("tokens/s", "?", f"not measured: {speed.says}")
    else:
        rate = speed.tokens_per_second * max(config.record.world_size, 1)
        seconds = config.steps * config.rows_of_a_step * config.context / rate
        table.add_row("tokens/s", f"{rate:,.0f}", speed.says)
        table.add_row("training", _duration(seconds), "without validation, samples and checkpoints")
    files = disk_space.run_files(config, vocab_size)
    kept = f"{files.kept} of {_on_disk(files.checkpoint)} and the exported model"
    table.add_row("checkpoints", _on_disk(files.left), f"{kept}; up to {_on_disk(files.most)} on the way")
    table.add_row("data", *_data_on_disk(config, vocab_size))
    if sizes.reading_teacher:
        table.add_row("teacher cache", _on_disk(_cache_bytes(config, vocab_size)), "at most, for training")
    return table


def _data_on_disk(config: Config, vocab_size: int) -> tuple[str, str]:
    folder = Path(config.path).expanduser() if config.path else None
    if config.data.get("source") == "bin" and folder is not None:
        return _on_disk(sum(file.stat().st_size for file in folder.glob("*.bin"))), "used where they lie"
    try:
        text = 0 if config.takes_pairs else data_module(config).text_bytes()
    except InputError as error:  # a plan may be made where the data are not
        return "?", str(error).splitlines()[0]
    if not text:
        return "?", "made once in cache_dir; known when they are"
    size = text // BYTES_OF_A_TOKEN * token_dtype(vocab_size).itemsize
    return _on_disk(size), f"about, for {_on_disk(text)} of text; made once in cache_dir"


def _cache_bytes(config: Config, vocab_size: int) -> int:
    from gpt2lab.distillation.teacher_cache import record_type

    positions = config.steps * config.rows_of_a_step * config.context
    return positions * record_type(config.teacher_cache, vocab_size).itemsize


def _on_disk(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f}"


def _duration(seconds: float) -> str:
    length, name = next((unit for unit in SECONDS if seconds >= 2 * unit[0]), SECONDS[-1])
    return f"{seconds / length:.1f} {name}"
