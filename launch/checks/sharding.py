"""Sharding checks: keys that need strategy=fsdp, and keys that it does not support."""

from gpt2lab.errors import InputError
from gpt2lab.settings import PrecisionSettings
from launch.config.schema import RunConfig


def check(config: RunConfig, accelerator: str, precision: PrecisionSettings, strategy: str) -> None:
    """Check sharding keys against the resolved device, precision and strategy.

    Raises:
        InputError: the first unsupported combination.
    """
    check_layer_drop(config, strategy)
    if strategy == "fsdp":
        if precision.has_loss_scaling:
            raise InputError(
                "precision=fp16 needs a gradient scaler, which strategy=fsdp does not support.\n"
                "Set precision=bf16 or fp32, or strategy=ddp."
            )
        if config.strategy.offload and accelerator != "gpu":
            offload = f"strategy.offload=true with accelerator={accelerator}"
            raise InputError(f"{offload}: everything is in host memory already.\nLeave it out.")
        return
    given = {
        "checkpoint_format=sharded": config.checkpoint_format == "sharded",
        "strategy.offload=true": config.strategy.offload,
        "strategy.shard_teacher=true": str(config.strategy.shard_teacher).lower() == "true",
    }
    for key, is_given in given.items():
        if is_given:
            name = key.split("=")[0]
            fix = f"Leave {name} out, or use strategy=fsdp."
            raise InputError(f"{key}: with strategy={strategy} every device holds the whole model.\n{fix}")


def check_layer_drop(config: RunConfig, strategy: str) -> None:
    """Check that layer_drop is not combined with FSDP, whose ranks must all-gather the same blocks."""
    if config.layer_drop and strategy == "fsdp":
        raise InputError(
            "layer_drop skips other blocks on each rank, but strategy=fsdp needs the same blocks on all ranks.\n"
            "Leave layer_drop out, or use strategy=ddp."
        )


def may_shard(config: RunConfig, accelerator: str, precision: PrecisionSettings) -> bool:
    """Whether strategy=fsdp supports the rest of the configuration."""
    return not config.layer_drop and not precision.has_loss_scaling and accelerator != "mps"
