"""Cluster: a run on several machines, whose processes torchrun or srun has started; each of them is one rank.

Rank 0 resolves the configuration, prepares data and makes the run directory, as a single process does, and then tells
the others, who train by what it says. The run directory must be one folder for all of them; data and tokenizer may lie
on each machine for itself, for the same text gives the same.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2lab.errors import InputError
from gpt2lab.system.heartbeat import GRACE_SECONDS, Heartbeat
from launch import exit_codes
from launch.config import run_spec
from launch.config.run_spec import PreparedSpec
from launch.config.schema import RunConfig
from launch.config.unused_keys import given_keys
from launch.rank_environment import by_srun, is_cluster_rank

if TYPE_CHECKING:
    from launch.distributed.watchdog import Watch

FAREWELL = timedelta(minutes=30)  # rank 0 may save so long after the others are done
SLURM_PORTS = 20_000  # a job's port is taken from the 10,000 above it
TOLD = "gpt2lab/told"
LOOK = timedelta(seconds=1)  # that one wait for it takes


def settle_environment() -> None:
    """Give PyTorch the variables that torchrun sets where srun has started this process.

    Raises:
        InputError: the nodes of the step cannot be told.
    """
    if not by_srun():
        return
    job, nodes = int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
    tasks = int(os.environ["SLURM_STEP_NUM_TASKS"])
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "GROUP_RANK": os.environ["SLURM_NODEID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(tasks // nodes),
        "MASTER_ADDR": _first_node(os.environ["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(SLURM_PORTS + job % 10_000),
    }


def _first_node(nodes: str) -> str:
    """`gpu[03-05,9],login` → the address of gpu03 where SLURM knows one, which names alone may not lead to."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)
    if found is None:
        raise InputError(f"SLURM_STEP_NODELIST={nodes} names no node.")
    name = found[1] + (found[2] or "")
    try:
        shown = subprocess.run(["scontrol", "show", "node", "-o", name], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return name
    address = re.search(r"\bNodeAddr=(\S+)", shown.stdout)
    return address[1] if address else name


def with_started_numbers(config: RunConfig) -> RunConfig:
    """Return the configuration with the `devices` and `num_nodes` that were started.

    Raises:
        InputError: other numbers were given.
    """
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    started = {"devices": here, "num_nodes": int(os.environ["WORLD_SIZE"]) // here}
    for key in set(given_keys(config.invocation.overrides)) & set(started):
        if vars(config)[key] not in ("auto", started[key]):
            raise InputError(
                f"{key}={vars(config)[key]}, and {started[key]} were started: {here} processes on each of "
                f"{started['num_nodes']} machines.\nLeave {key} out, or start as many."
            )
    return replace(config, devices=started["devices"], num_nodes=started["num_nodes"])


class Meeting:
    """Where the ranks of a run meet: a key-value store on rank 0's machine.

    Args:
        seconds: that they wait for a rank 0 without a sign of life.

    Raises:
        answer.Ended: rank 0's machine does not answer.
    """

    def __init__(self, seconds: int) -> None:
        from torch.distributed import DistNetworkError, PrefixStore, TCPStore

        from launch.distributed.watchdog import StoreBoard

        self.rank, self.world_size, self._seconds = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), seconds
        has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's own listens already
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        is_master, timeout = self.rank == 0 and not has_store, timedelta(seconds=seconds)
        try:
            store = TCPStore(host, port, is_master=is_master, wait_for_workers=False, timeout=timeout)
        except DistNetworkError as error:
            if is_master:
                raise
            told = f"rank {self.rank} could not reach rank 0 at {host}:{port} for rank_timeout={seconds} seconds"
            raise exit_codes.Ended(exit_codes.FAILED, f"The run failed: {told}.") from error
        self._store = PrefixStore(f"gpt2lab/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self._beats = PrefixStore("beats", self._store)
        self._heartbeat = Heartbeat(StoreBoard(self._beats), self.rank)

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """On rank 0: should the block fail, the others are told, and need not wait."""
        try:
            yield
        except BaseException:
            self._store.set(TOLD, json.dumps(None))
            raise

    def tell(self, spec: PreparedSpec, folder: Path) -> None:
        """On rank 0: send the prepared run and its directory to all others."""
        self._store.set(TOLD, json.dumps({"spec": run_spec.to_yaml(spec), "folder": str(folder.absolute())}))

    def told(self) -> tuple[PreparedSpec, Path]:
        """On the others: receive the prepared run and its directory from rank 0.

        A rank 0 that lives may take its time; then rank 1 says every so often that all wait.

        Raises:
            answer.Ended: rank 0 has failed, and says itself of what.
        """
        watch, begun, due = self._watch(self._seconds), time.monotonic(), self._seconds
        clock = time.strftime("%H:%M:%S")
        try:
            while not self._has_told():
                waited = time.monotonic() - begun
                if self.rank == 1 and waited >= due:
                    due += self._seconds
                    words = f"Rank 0, on {os.environ['MASTER_ADDR']}, still prepares the run; the others have waited"
                    print(f"{words} since {clock}, {waited:.0f} seconds.", file=sys.stderr, flush=True)
        finally:
            watch.stop()
        told = json.loads(self._store.get(TOLD))
        if told is None:
            raise exit_codes.Ended(exit_codes.FAILED)
        return run_spec.from_yaml(PreparedSpec, told["spec"], "sent by rank 0"), Path(told["folder"])

    def _has_told(self) -> bool:
        """Waits for it a second, so that signals are heeded."""
        try:
            self._store.wait([TOLD], LOOK)
        except RuntimeError as error:
            if is_timeout(error):
                return False
            raise
        return True

    def _watch(self, seconds: int) -> "Watch":
        from launch.distributed.watchdog import Watch

        return Watch(self._beats, self._heartbeat, self.rank, self.world_size, seconds)

    @contextmanager
    def training(self, spec: PreparedSpec) -> Iterator[Heartbeat]:
        """The block runs in a process group of all ranks; none leaves before all have ended it in good order.

        Gives this rank's heartbeat, which the others hear: one that keeps them waiting for longer than `rank_timeout`
        is named, and the run ended.
        """
        import torch
        from torch import distributed
        from torch.distributed import PrefixStore

        if spec.machine.accelerator == "gpu":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl" if spec.machine.accelerator == "gpu" else "gloo"
        group_store = PrefixStore("group", self._store)
        timeout = timedelta(seconds=spec.config.rank_timeout + GRACE_SECONDS)
        watch = self._watch(spec.config.rank_timeout)
        try:
            distributed.init_process_group(
                backend, store=group_store, rank=self.rank, world_size=self.world_size, timeout=timeout
            )
            yield self._heartbeat
        except exit_codes.Ended:
            watch.stop()
            self._leave()
            raise
        except RuntimeError as error:
            if is_timeout(error):
                watch.end_in_vain()
            raise
        watch.stop()
        self._leave()

    def _leave(self) -> None:
        """Whoever ends first would take torchrun's word for the rest, which may still be saving."""
        self._heartbeat.done()
        self._store.set(f"left/{self.rank}", "")
        self._store.wait([f"left/{rank}" for rank in range(self.world_size)], FAREWELL)
        if self.rank == 0:  # the store may be this process's own: let the others read it first
            self._store.wait([f"gone/{rank}" for rank in range(1, self.world_size)], FAREWELL)
        else:
            self._store.set(f"gone/{self.rank}", "")


def is_timeout(error: Exception) -> bool:
    """Whether a rank gave up waiting for the others."""
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in ("timeout", "timed out"))


def is_lost_connection(error: Exception) -> bool:
    """Whether an operation failed because another rank has ended: gloo and the store raise plain RuntimeErrors."""
    of_sockets = ("gloo/transport", "connection closed by peer", "connection reset by peer", "broken pipe")
    signs = (*of_sockets, "remote process exited", "failed to recv")  # NCCL, the store
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)


def check(config: RunConfig) -> None:
    """Several machines need somebody to start processes on them.

    Raises:
        InputError
    """
    if config.num_nodes > 1 and not is_cluster_rank() and config.launcher.name == "processes":
        raise InputError(
            f"num_nodes={config.num_nodes}: start the run on every machine, for example with\n"
            f"  torchrun --nnodes={config.num_nodes} --nproc-per-node=1 --rdzv-backend=c10d "
            "--rdzv-endpoint=FIRST_HOST:29500 train.py …\n"
            f"or: srun -K --nodes={config.num_nodes} --ntasks-per-node=1 python train.py …\n"
            "or let SLURM do so: launcher=slurm"
        )


def check_data(spec: PreparedSpec, data_hash: str) -> None:
    """The data prepared on this machine are those of rank 0.

    Raises:
        InputError
    """
    if spec.prepared.data_hash != data_hash:
        raise InputError(
            f"The data on {os.uname().nodename} differ from those of the first machine.\n"
            "Give all machines the same files, or one cache_dir that they share."
        )
