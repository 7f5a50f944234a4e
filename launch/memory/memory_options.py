"""Memory options: keys that change the peak memory of a run, with the new peak and what they cost."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from launch.config.groups import precision_named
from launch.memory.memory_plan import MemoryPlan, memory_plan
from launch.memory.memory_terms import RunSizes


@dataclass(frozen=True)
class MemoryOption:
    """An override that changes the peak memory.

    Attributes:
        key: the override, `key=value`.
        peak: peak bytes of one device with it.
        cost: disadvantage, in words.
    """

    key: str
    peak: int
    cost: str


def memory_options(sizes: RunSizes, now: MemoryPlan, may_shard: bool = True) -> list[MemoryOption]:
    """List the overrides that change the peak of a plan, largest saving first.

    Args:
        may_shard: whether strategy=fsdp supports the rest of the configuration.
    """
    options = [
        MemoryOption(key, memory_plan(changed, now.process).peak, cost)
        for key, changed, cost in _candidates(sizes, may_shard)
    ]
    return sorted((option for option in options if option.peak != now.peak), key=lambda option: option.peak)


def _candidates(sizes: RunSizes, may_shard: bool) -> Iterator[tuple[str, RunSizes, str]]:
    if not sizes.checkpointing:
        yield "activation_checkpointing=true", replace(sizes, checkpointing=True), "a third more time"
    if sizes.rows > 1:
        half = replace(sizes, rows=sizes.rows // 2)
        if half.rows > 1:
            yield f"micro_batch={half.rows}", half, "nothing, unless the device is underused"
        yield "micro_batch=1", replace(sizes, rows=1), "speed"
    if sizes.precision.name == "fp32":
        mixed = replace(sizes, precision=precision_named("bf16"))
        yield "precision=bf16", mixed, "accuracy; faster where supported"
    if not sizes.precision.is_bf16_true:
        low = replace(sizes, precision=precision_named("bf16_true"))
        yield "precision=bf16_true", low, "accuracy; stochastic rounding"
    if sizes.optimizer == "muon" or not sizes.lora_rank:
        other = "adamw" if sizes.optimizer == "muon" else "muon"
        yield f"optimizer={other}", replace(sizes, optimizer=other), "another optimizer with its own learning rate"
    ranks = max(sizes.ranks, 2)
    fill_ranks = max(sizes.step_rows, sizes.rows) * sizes.ranks >= ranks  # each rank needs a sequence
    if may_shard and not sizes.sharded and fill_ranks:
        sharded = replace(sizes, sharded=True, ranks=ranks, step_rows=-(-sizes.step_rows * sizes.ranks // ranks))
        sharded = replace(sharded, rows=min(sizes.rows, sharded.step_rows))
        yield f"strategy=fsdp devices={ranks}", sharded, "communication"
    if sizes.teacher:
        cached = replace(sizes, teacher=None, cached_teacher=sizes.teacher, sampled_cache=True)
        yield "teacher_cache=sampled", cached, "disk; one pass of the teacher over the data before training"
    if sizes.ema:
        yield "ema=0", replace(sizes, ema=False), "the average of the weights"
    if sizes.masked and sizes.target_share == 1:
        yield "packing=false", replace(sizes, masked=False), "attention across documents in a window"
    if sizes.length > 1:
        shorter = replace(sizes, length=sizes.length // 2)  # the same number of sequences per micro-batch
        yield f"context={shorter.length}", shorter, "long-range context; a step has as many tokens"
