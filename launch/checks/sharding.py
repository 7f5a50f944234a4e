"""Sharding checks: keys that only strategy=fsdp supports, and those that it does not."""

from gpt2lab.errors import InputError
from gpt2lab.settings import PrecisionSettings
from launch.config.schema import RunConfig


def check(config: RunConfig, accelerator: str, precision: PrecisionSettings, strategy: str) -> None:
    """Check that the keys about sharding suit the device, the precision and the strategy, as they are resolved.

    Raises:
        InputError
    """
    if strategy == "fsdp":
        _check_precision(precision)
        _check_offload(config, accelerator)
        return
    whole = "every device holds the whole model"
    given = {
        "checkpoint_format=sharded": config.checkpoint_format == "sharded",
        "fsdp_offload=true": config.fsdp_offload,
        "shard_teacher=true": str(config.shard_teacher).lower() == "true",
    }
    for key, is_given in given.items():
        if is_given:
            name = key.split("=")[0]
            fix = f"Leave {name} out, or use strategy=fsdp."
            raise InputError(f"{key}: with strategy={strategy} {whole}.\n{fix}")


def may_shard(config: RunConfig, accelerator: str, precision: PrecisionSettings) -> bool:
    """Whether strategy=fsdp would take everything else as it is set."""
    return not config.layer_drop and not precision.has_loss_scaling and accelerator != "mps"


def _check_precision(precision: PrecisionSettings) -> None:
    if precision.has_loss_scaling:
        raise InputError(
            "precision=fp16 needs a gradient scaler, and there is none for strategy=fsdp.\n"
            "Set precision=bf16 or fp32, or strategy=ddp."
        )


def _check_offload(config: RunConfig, accelerator: str) -> None:
    if config.fsdp_offload and accelerator != "gpu":
        raise InputError(
            f"fsdp_offload=true: with accelerator={accelerator} everything lies in the host's memory already.\n"
            "Leave it out."
        )
