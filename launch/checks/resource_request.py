"""Wanted machines: what a run asks a cluster for, since the machine that submits it is not the one that runs it."""

from dataclasses import dataclass, replace
from pathlib import Path

from gpt2lab.errors import InputError
from launch.config import run_spec
from launch.config.schema import STUDY, RunConfig


@dataclass(frozen=True)
class Machines:
    """Number of machines, and on each of them: devices, and whether these are GPUs."""

    nodes: int
    devices: int
    are_gpus: bool

    @property
    def gpus(self) -> int:
        """GPUs on each machine."""
        return self.devices if self.are_gpus else 0


def check(config: RunConfig) -> None:
    """Device and number are named, for nobody here can look.

    Raises:
        InputError
    """
    name = config.launcher.name
    if name == "processes":
        return
    if config.is_study:
        raise InputError(
            f"experiment={STUDY} starts its runs one after the other on this machine.\n"
            "Leave launcher out, and start the study on a machine that fits."
        )
    if config.accelerator not in ("cpu", "gpu"):
        raise InputError(
            f"launcher={name}: say which machine to ask for, since it is not this one.\n"
            "Give accelerator=gpu devices=N, or accelerator=cpu."
        )
    if config.accelerator == "gpu" and config.devices == "auto":
        raise InputError(f"launcher={name}: say how many GPUs to ask for, devices=N.")
    if name == "ray" and config.num_nodes > 1:
        raise InputError(
            f"num_nodes={config.num_nodes}: launcher=ray gives each run one machine.\n"
            "Use launcher=slurm, or torchrun on every machine."
        )
    if config.launcher.executor == "local" and config.num_nodes > 1:
        raise InputError(f"num_nodes={config.num_nodes}: launcher.executor=local has one machine, this one.")
    if config.num_nodes > 1 and config.max_restarts:
        raise InputError(
            "max_restarts is read where this program starts all ranks, which SLURM does with num_nodes above 1.\n"
            "Leave it out: a job whose machine fails is queued again by SLURM itself."
        )


def request_from(config: RunConfig) -> Machines:
    """Return what a checked run requests; a resumed one requests what it had, unless something else was given.

    Raises:
        InputError
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
    return Machines(config.num_nodes, devices, config.accelerator == "gpu")
