"""Sharding checks: what only strategy=fsdp can do, and what it cannot; asked once the strategy is settled."""

from gpt2lab.errors import InputError
from launch.config.schema import Config


def check(config: Config) -> None:
    """Whether the keys about sharding suit the strategy, the precision and the device.

    Raises:
        InputError
    """
    if config.strategy == "fsdp":
        _check_precision(config)
        _check_offload(config)
        return
    whole = "every device holds the whole model"
    asked = {
        "checkpoint_format=sharded": config.checkpoint_format == "sharded",
        "fsdp_offload=true": config.fsdp_offload,
        "shard_teacher=true": str(config.shard_teacher).lower() == "true",
    }
    for key, is_asked in asked.items():
        if is_asked:
            name = key.split("=")[0]
            cure = f"Leave {name} out, or use strategy=fsdp."
            raise InputError(f"{key}: with strategy={config.strategy} {whole}.\n{cure}")


def may_shard(config: Config) -> bool:
    """Whether strategy=fsdp would take everything else as it is set."""
    return not config.layer_drop and config.precision not in ("fp16", "fp8") and config.accelerator != "mps"


def _check_precision(config: Config) -> None:
    if config.precision == "fp16":
        raise InputError(
            "precision=fp16 needs a gradient scaler, and there is none for strategy=fsdp.\n"
            "Set precision=bf16 or fp32, or strategy=ddp."
        )
    if config.precision == "fp8":
        raise InputError(
            "precision=fp8 is an experiment for weights that are whole on each device, and strategy=fsdp splits them.\n"
            "Set precision=bf16, or strategy=ddp."
        )


def _check_offload(config: Config) -> None:
    if config.fsdp_offload and config.accelerator != "gpu":
        raise InputError(
            f"fsdp_offload=true: with accelerator={config.accelerator} everything lies in the host's memory already.\n"
            "Leave it out."
        )
