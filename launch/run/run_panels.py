"""Run panels: the facts of a run before its first step, and its results with the next commands after the last."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gpt2lab.reports.next_commands import next_commands
from gpt2lab.reports.page import shown_path
from gpt2lab.settings import DataFacts
from gpt2lab.storage.checkpoint_ledger import checkpoint_step
from gpt2lab.storage.model_folder import parameter_count, read_shape
from gpt2lab.system.terminal import console, format_time, is_live, show
from launch.config.run_spec import PreparedSpec
from launch.memory.run_sizes import rank_memory_limit
from launch.run import auto_settings, earlier_run
from launch.run.run_uses import run_uses

NARROWEST, WIDEST = 40, 100  # columns of a panel
MEASURED_LATER = "known after the first steps"
BORDERS = 6  # columns of a panel besides names and texts
OVERVIEWS = ("study.json", "demo.html")  # beside the runs of a command that shows the results of all

Rows = Sequence[tuple[str, str]]


def show_start(spec: PreparedSpec, facts: DataFacts, folder: Path, checkpoint: Path | None) -> None:
    """Print the facts of a run; of a run of a sweep or study only its teacher and directory.

    Args:
        checkpoint: the checkpoint that it is resumed from.
    """
    is_one_of_many = _is_one_of_many(spec, folder)
    rows = _teacher(spec) if is_one_of_many else [*_what(spec, facts), *_how(spec), *_cost(spec)]
    if checkpoint is not None:
        rows.append(("resumed", f"after step {checkpoint_step(checkpoint):,}"))
    rows.append(("run", str(folder)))
    if is_one_of_many:
        show("\n".join(f"{name}: {text}" for name, text in rows))
        return
    if spec.config.callbacks.get("report") is not None:
        rows.append(("page", f"{folder}/report.html"))
    _show_panel(f"{spec.config.task_name} {spec.resolved.model_name}", rows)


def show_end(spec: PreparedSpec, report: dict[str, Any], folder: Path) -> None:
    """Print score, time and page of a run, and the commands that use it; of a run of a sweep or study one line."""
    score = f"{report['watched_metric']} {report['watched']:.4f}" if report["watched"] is not None else ""
    title = ": ".join(part for part in (report.get("status", "finished"), score) if part)
    if _is_one_of_many(spec, folder):
        show(f"{title} · {folder}/report.html")
        return
    _show_panel(title, _results(report, folder))
    uses = run_uses(spec, folder)
    commands = next_commands({**report, "uses": uses}, shown_path(folder), (folder / "hf").is_dir())
    show("\n".join(f"{name}:\n  {command}" for name, command in commands.items()))


def _is_one_of_many(spec: PreparedSpec, folder: Path) -> bool:
    """Whether the run is part of a sweep, a study or the demo, which prints the results of all."""
    return bool(spec.config.invocation.sweep) or any((folder.parent / name).is_file() for name in OVERVIEWS)


def _show_panel(title: str, rows: Rows) -> None:
    """Print a box in a terminal, elsewhere and in a narrow one plain lines."""
    width = max((len(name) for name, _ in rows), default=0)
    if not is_live(console().file) or console().width < NARROWEST:
        show("\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in rows)]))
        return
    columns = min(console().width, WIDEST)
    room = columns - BORDERS - width
    is_long = {name: max(map(cell_len, text.split(" "))) > room for name, text in rows}
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        if not is_long[name]:
            table.add_row(Text(name), Text(text))
    show(Panel(table, title=Text(title, "bold"), title_align="left", width=columns))
    for name, text in rows:
        if is_long[name]:  # whole, so that a path can be copied
            show(f"{name}: {text}")


def _what(spec: PreparedSpec, facts: DataFacts) -> list[tuple[str, str]]:
    """Rows of model, data, initial weights and teacher."""
    config, inputs = spec.config, spec.resolved
    sizes = inputs.model
    shape = f"{_count(sizes.n_layer or 0, 'layer')} of {sizes.n_embd}, {_count(sizes.n_head or 0, 'head')}"
    total = parameter_count({**vars(sizes), "vocab_size": spec.prepared.vocab_size})
    rows = [
        ("model", f"{total:,} parameters: {shape}"),
        ("data", f"{facts.name}, {facts.train_tokens:,} tokens, vocabulary of {facts.vocab_size:,}"),
    ]
    if inputs.init_names_weights:
        rows.append(("init", shown_path(inputs.init)))
    if config.objective.name != "clm":
        rows.append(("objective", config.objective.name))
    return [*rows, *_teacher(spec)]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _teacher(spec: PreparedSpec) -> list[tuple[str, str]]:
    teacher, cache = spec.resolved.teacher, spec.config.teacher_cache.name
    if not teacher:
        return []
    usage = "runs at every step" if cache == "none" else f"read once, teacher_cache={cache}"
    size = parameter_count(read_shape(Path(teacher)))
    return [("teacher", f"{shown_path(teacher)}, {size:,} parameters, {usage}")]


def _how(spec: PreparedSpec) -> list[tuple[str, str]]:
    """Rows of device, precision and steps."""
    config, machine = spec.config, spec.machine
    strategy = f", strategy={machine.strategy}" if machine.strategy != "auto" else ""
    threads = f", {_count(machine.threads, 'thread')}" if machine.accelerator == "cpu" else ""
    compiled = ", compiled" if spec.prepared.compile else ""
    rows = config.global_batch_rows
    positions = config.steps * rows * config.context
    return [
        ("device", f"{machine.world_size} × {machine.accelerator}{threads}{strategy}{compiled}"),
        ("precision", _precision(spec)),
        ("steps", f"{config.steps:,} of {rows} × {config.context} tokens, {positions:,} in all"),
    ]


def _precision(spec: PreparedSpec) -> str:
    """Return the precision, and the reason for it under precision=auto."""
    chosen = spec.machine.precision.name
    if spec.config.precision.name != "auto":
        return chosen
    does = "multiplies" if chosen == "bf16" else "does not multiply"
    return f"{chosen}: this {spec.machine.accelerator.upper()} {does} bf16 in hardware"


def _cost(spec: PreparedSpec) -> list[tuple[str, str]]:
    """Rows of memory and time."""
    planned, process = spec.prepared.planned_memory["peak"], spec.prepared.planned_memory["process"]
    room = rank_memory_limit(spec.machine, auto_settings.free_memory(spec.config), process)
    free = "" if room is None else f", {room / 1e9:.1f} GB are free"
    earlier = earlier_run.estimate(spec)
    time = MEASURED_LATER if earlier is None else f"about {format_time(earlier.seconds)}, as in {earlier.folder}"
    return [("memory", f"about {planned / 1e9:.1f} GB{free}"), ("time", time)]


def _results(report: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Rows of the scores that are not in the title, of the time by phase, and of the page."""
    rows = []
    if report.get("val_perplexity") is not None:
        bits = f", {report['bits_per_byte']:.3f} bits per byte" if report.get("bits_per_byte") is not None else ""
        rows.append(("perplexity", f"{report['val_perplexity']:.2f}{bits}"))
    if report.get("full_val_loss") not in (None, report["watched"]):
        error = f" ± {report['full_val_loss_error']:.4f}" if report.get("full_val_loss_error") is not None else ""
        rows.append(("final score", f"{report['full_val_loss']:.4f}{error} on {report['full_val_tokens']:,} tokens"))
    if report.get("tokens_per_second"):
        memory = f", {report['peak_memory_bytes'] / 1e9:.1f} GB" if report.get("peak_memory_bytes") else ""
        rows.append(("speed", f"{report['tokens_per_second']:,.0f} tokens/s{memory}"))
    phases = {name: seconds for name, seconds in report.get("seconds_by_phase", {}).items() if seconds >= 0.5}
    if phases:
        whole = ", ".join(f"{name} {format_time(seconds)}" for name, seconds in phases.items())
        rows.append(("time", whole))
    return [*rows, ("page", f"{folder}/report.html")]
