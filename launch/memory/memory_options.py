"""Knobs: what else could be set, and how many bytes of a device it would save."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from launch.config.groups import precision_named
from launch.memory.memory_plan import MemoryPlan, memory_plan
from launch.memory.memory_terms import RunSizes


@dataclass(frozen=True)
class Knob:
    """A key set otherwise, the peak with it, and what that costs."""

    key: str
    peak: int
    price: str


def knobs(sizes: RunSizes, now: MemoryPlan, may_shard: bool = True) -> list[Knob]:
    """Those that change the peak of a plan, the one that saves most first.

    Args:
        may_shard: whether strategy=fsdp would take the rest of the configuration.
    """
    found = [Knob(key, memory_plan(other, now.process).peak, price) for key, other, price in _choices(sizes, may_shard)]
    return sorted((knob for knob in found if knob.peak != now.peak), key=lambda knob: knob.peak)


def _choices(sizes: RunSizes, may_shard: bool) -> Iterator[tuple[str, RunSizes, str]]:
    if not sizes.checkpointing:
        yield "activation_checkpointing=true", replace(sizes, checkpointing=True), "a third more time"
    if sizes.rows > 1:
        half = replace(sizes, rows=sizes.rows // 2)
        if half.rows > 1:
            yield f"micro_batch={half.rows}", half, "nothing, unless the device is left idle"
        yield "micro_batch=1", replace(sizes, rows=1), "speed"
    if sizes.precision.name == "fp32":
        yield (
            "precision=bf16",
            replace(sizes, precision=precision_named("bf16")),
            "digits; faster where the device has bf16",
        )
    if not sizes.precision.is_bf16_true:
        yield (
            "precision=bf16_true",
            replace(sizes, precision=precision_named("bf16_true")),
            "digits; updates are rounded by chance",
        )
    if sizes.optimizer != "muon" and not sizes.lora_rank:
        yield "optimizer=muon", replace(sizes, optimizer="muon"), "another optimizer with its own learning rate"
    if sizes.optimizer == "muon":
        yield "optimizer=adamw", replace(sizes, optimizer="adamw"), "another optimizer with its own learning rate"
    ranks = max(sizes.ranks, 2)
    fill_ranks = max(sizes.step_rows, sizes.rows) * sizes.ranks >= ranks  # each needs a sequence
    if may_shard and not sizes.sharded and fill_ranks:
        shared = replace(sizes, sharded=True, ranks=ranks, step_rows=-(-sizes.step_rows * sizes.ranks // ranks))
        yield f"strategy=fsdp devices={ranks}", replace(shared, rows=min(sizes.rows, shared.step_rows)), "communication"
    if sizes.teacher:
        stored = replace(sizes, teacher=None, reading_teacher=sizes.teacher)
        yield "teacher_cache=sampled", stored, "disk; the teacher reads the data once, before training"
    if sizes.ema:
        yield "ema=0", replace(sizes, ema=False), "the average of the weights"
    if sizes.masked and not sizes.pairs:
        yield "packing=false", replace(sizes, masked=False), "documents in a window see each other"
    if sizes.length > 1:
        yield f"context={sizes.length // 2}", _half_as_long(sizes), "what is further away; as many tokens in a step"


def _half_as_long(sizes: RunSizes) -> RunSizes:
    """The same number of sequences, half as long: what is said by hand of micro_batch stays."""
    return replace(sizes, length=sizes.length // 2)
