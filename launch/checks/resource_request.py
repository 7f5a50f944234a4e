"""Resource request: machines and devices that a run requests from a cluster through `launcher=`."""

from dataclasses import dataclass, replace
from pathlib import Path

from gpt2lab.errors import InputError
from launch.config import run_spec
from launch.config.schema import STUDY, RunConfig


@dataclass(frozen=True)
class Machines:
    """Resource request.

    Attributes:
        nodes: number of machines.
        devices: devices on each machine.
        gpus: GPUs on each machine: its devices, or 0 for a run on CPUs.
    """

    nodes: int
    devices: int
    gpus: int


def check(config: RunConfig) -> None:
    """Check that accelerator and devices are explicit: the submitting machine cannot detect those of the cluster.

    Raises:
        InputError: they are `auto`, or the launcher does not support the request.
    """
    name = config.launcher.name
    if name == "processes":
        return
    if config.is_study:
        raise InputError(
            f"experiment={STUDY} starts its runs one after the other on this machine.\n"
            "Leave launcher out, and start the study on a suitable machine."
        )
    if config.accelerator not in ("cpu", "gpu"):
        raise InputError(
            f"launcher={name} cannot detect the devices of another machine.\n"
            "Give accelerator=gpu devices=N, or accelerator=cpu."
        )
    if config.accelerator == "gpu" and config.devices == "auto":
        raise InputError(f"launcher={name} needs the number of GPUs to request: devices=N.")
    if name == "ray" and config.num_nodes > 1:
        raise InputError(
            f"num_nodes={config.num_nodes}: launcher=ray gives each run one machine.\n"
            "Use launcher=slurm, or torchrun on every machine."
        )
    if config.launcher.executor == "local" and config.num_nodes > 1:
        raise InputError(f"num_nodes={config.num_nodes}: launcher.executor=local supports one machine.")
    if config.num_nodes > 1 and config.max_restarts:
        raise InputError(
            "max_restarts needs ranks started by this program, but SLURM starts them with num_nodes above 1.\n"
            "Leave it out: SLURM requeues a job whose machine fails."
        )


def request_from(config: RunConfig) -> Machines:
    """Return the request of a run; a resumed run requests the same as before, unless other values are given.

    Raises:
        InputError: as `check`.
    """
    if config.resume not in (None, "auto"):
        stored = run_spec.load(Path(str(config.resume)).expanduser() / "config.yaml").machine
        config = replace(
            config,
            accelerator=stored.accelerator if config.accelerator == "auto" else config.accelerator,
            devices=stored.devices if config.devices == "auto" else config.devices,
            num_nodes=stored.num_nodes if config.num_nodes == 1 else config.num_nodes,
        )
    check(config)
    devices = 1 if config.devices == "auto" else int(config.devices)
    return Machines(config.num_nodes, devices, devices if config.accelerator == "gpu" else 0)
