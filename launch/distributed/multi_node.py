"""Multi-node runs: rendezvous and process group of ranks that torchrun or srun has started.

Rank 0 resolves the configuration, prepares the data and creates the run directory, as a single process does, and sends
both to the other ranks. All machines must share the run directory. Each may have its own copy of the data and the
tokenizer; their hashes must be equal.
"""

import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
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
from launch.rank_environment import is_cluster_rank, is_srun_rank

if TYPE_CHECKING:
    from torch.distributed import TCPStore

    from launch.distributed.watchdog import Watchdog

log = logging.getLogger(__name__)

SHUTDOWN_TIMEOUT = timedelta(minutes=30)  # rank 0 may still be saving after the other ranks are done
SLURM_PORTS = 20_000  # a job's port is one of the 10,000 above this one, chosen by job id
AGENT_TIMEOUT = timedelta(seconds=30)  # torchrun's agent serves its store before it starts a rank
FIRST_WAIT = timedelta(seconds=10)  # for rank 0, before a message
HANDSHAKE = timedelta(seconds=5)  # more than a connection's timeout, after which PyTorch itself raises an error
SPEC_KEY = "gpt2lab/spec"
WAIT_SLICE = timedelta(seconds=1)  # one blocking wait; Python handles signals between two


def set_torchrun_variables() -> None:
    """Set the environment variables that torchrun would set, if srun has started this process.

    Raises:
        InputError: SLURM_STEP_NODELIST cannot be parsed.
    """
    if not is_srun_rank():
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
    """`gpu[03-05,9],login` → address of gpu03 from scontrol, since its name may not resolve; otherwise the name."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)
    if found is None:
        raise InputError(f"SLURM_STEP_NODELIST={nodes} contains no node name.")
    name = found[1] + (found[2] or "")
    try:
        shown = subprocess.run(["scontrol", "show", "node", "-o", name], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return name
    address = re.search(r"\bNodeAddr=(\S+)", shown.stdout)
    return address[1] if address else name


def with_started_world(config: RunConfig) -> RunConfig:
    """Return the configuration with `devices` and `num_nodes` as torchrun or srun has started them.

    Raises:
        InputError: the command line sets other values.
    """
    local_size = int(os.environ["LOCAL_WORLD_SIZE"])
    started = {"devices": local_size, "num_nodes": int(os.environ["WORLD_SIZE"]) // local_size}
    for key in set(given_keys(config.invocation.overrides)) & set(started):
        if vars(config)[key] not in ("auto", started[key]):
            raise InputError(
                f"{key}={vars(config)[key]}, but {started[key]} were started: {local_size} processes on each of "
                f"{started['num_nodes']} machines.\nLeave {key} out, or start that many."
            )
    return replace(config, devices=started["devices"], num_nodes=started["num_nodes"])


class Rendezvous:
    """Rendezvous of all ranks through a TCPStore on rank 0's machine.

    Args:
        seconds: timeout for connecting, and for a rank 0 without a heartbeat.

    Raises:
        InputError: the variables of torchrun are set, but its agent does not answer.
        exit_codes.Exit: this rank cannot connect to rank 0.
    """

    def __init__(self, seconds: int) -> None:
        from torch.distributed import PrefixStore

        from launch.distributed.watchdog import StoreBoard

        self.rank, self.world_size, self._seconds = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), seconds
        has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun hosts one already
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if has_store:
            store = self._agent_store(host, port)
        else:
            store = self._own_store(host, port)
        store.set_timeout(timedelta(seconds=seconds))
        self._store = PrefixStore(f"gpt2lab/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self._beats = PrefixStore("beats", self._store)
        self._heartbeat = Heartbeat(StoreBoard(self._beats), self.rank)

    def _agent_store(self, host: str, port: int) -> "TCPStore":
        """Connect to the store of torchrun's agent."""
        from torch.distributed import DistNetworkError, TCPStore

        refusal = (
            f"TORCHELASTIC_RUN_ID={os.environ['TORCHELASTIC_RUN_ID']} is set, as torchrun does, but no torchrun "
            f"answers at MASTER_ADDR:MASTER_PORT, {host}:{port}.\n"
            "If torchrun did not start this process, unset TORCHELASTIC_RUN_ID."
        )
        try:
            with _after(AGENT_TIMEOUT + HANDSHAKE, lambda: _end(exit_codes.USER_ERROR, f"error: {refusal}")):
                return TCPStore(host, port, is_master=False, timeout=AGENT_TIMEOUT)
        except DistNetworkError as error:
            raise InputError(refusal) from error

    def _own_store(self, host: str, port: int) -> "TCPStore":
        """Serve the store as rank 0, or connect to that of rank 0."""
        from torch.distributed import DistNetworkError, TCPStore

        if self.rank == 0:
            log.info("Rank 0 of %d waits for the other ranks at %s:%d.", self.world_size, host, port)
            return TCPStore(host, port, is_master=True, wait_for_workers=False)
        timeout = timedelta(seconds=self._seconds)
        waits = f"Rank {self.rank} waits for rank 0 at {host}:{port}."
        reason = f"rank {self.rank} could not reach rank 0 at {host}:{port} for rank_timeout={self._seconds} seconds"
        failure = f"The run failed: {reason}."
        try:
            with (
                _after(FIRST_WAIT, lambda: print(waits, file=sys.stderr, flush=True)),
                _after(timeout + HANDSHAKE, lambda: _end(exit_codes.FAILED, failure)),
            ):
                return TCPStore(host, port, is_master=False, timeout=timeout)
        except DistNetworkError as error:
            raise exit_codes.Exit(exit_codes.FAILED, failure) from error

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Report an error of the block to the other ranks, which then end at once (rank 0 only)."""
        try:
            yield
        except BaseException:
            self._store.set(SPEC_KEY, json.dumps(None))
            raise

    def send(self, spec: PreparedSpec, folder: Path) -> None:
        """Send the prepared run and its directory to the other ranks (rank 0 only)."""
        self._store.set(SPEC_KEY, json.dumps({"spec": run_spec.to_yaml(spec), "folder": str(folder.absolute())}))

    def receive(self) -> tuple[PreparedSpec, Path]:
        """Wait for the prepared run and its directory from rank 0 (all other ranks).

        There is no time limit while rank 0 has a heartbeat; rank 1 logs the waiting time every `seconds`.

        Raises:
            exit_codes.Exit: rank 0 has failed; it prints the error itself.
        """
        watch, begin, due = self._watch(self._seconds), time.monotonic(), self._seconds
        clock = time.strftime("%H:%M:%S")
        try:
            while not self._is_sent():
                waited = time.monotonic() - begin
                if self.rank == 1 and waited >= due:
                    due += self._seconds
                    state = f"Rank 0, on {os.environ['MASTER_ADDR']}, still prepares the run; the others have waited"
                    print(f"{state} since {clock}, {waited:.0f} seconds.", file=sys.stderr, flush=True)
        finally:
            watch.stop()
        message = json.loads(self._store.get(SPEC_KEY))
        if message is None:
            raise exit_codes.Exit(exit_codes.FAILED)
        return run_spec.from_yaml(PreparedSpec, message["spec"], "sent by rank 0"), Path(message["folder"])

    def _is_sent(self) -> bool:
        """Wait up to one second for rank 0's message."""
        try:
            self._store.wait([SPEC_KEY], WAIT_SLICE)
        except RuntimeError as error:
            if is_timeout(error):
                return False
            raise
        return True

    def _watch(self, seconds: int) -> "Watchdog":
        from launch.distributed.watchdog import Watchdog

        return Watchdog(self._beats, self._heartbeat, self.rank, self.world_size, seconds)

    @contextmanager
    def training(self, spec: PreparedSpec) -> Iterator[Heartbeat]:
        """Run the block in a process group of all ranks, with a barrier at its end.

        Yields this rank's heartbeat. The other ranks end the run, and name the late rank, if this one keeps them
        waiting for longer than `rank_timeout` seconds.
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
        except exit_codes.Exit:
            watch.stop()
            self._leave()
            raise
        except RuntimeError as error:
            if is_timeout(error):
                watch.exit_after_timeout()
            raise
        watch.stop()
        self._leave()

    def _leave(self) -> None:
        """Wait until all ranks are done: torchrun ends the others, which may still be saving, when one exits early."""
        self._heartbeat.done()
        self._store.set(f"left/{self.rank}", "")
        self._store.wait([f"left/{rank}" for rank in range(self.world_size)], SHUTDOWN_TIMEOUT)
        if self.rank == 0:  # this process may host the store, which the others still read
            self._store.wait([f"gone/{rank}" for rank in range(1, self.world_size)], SHUTDOWN_TIMEOUT)
        else:
            self._store.set(f"gone/{self.rank}", "")


@contextmanager
def _after(timeout: timedelta, act: Callable[[], None]) -> Iterator[None]:
    """Act once if the block takes longer: connecting to a TCPStore can neither be interrupted nor handle a signal."""
    timer = threading.Timer(timeout.total_seconds(), act)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end(code: int, message: str) -> None:
    """End a process that connects to a server that never answers, for which TCPStore has no time limit."""
    print(message, file=sys.stderr, flush=True)
    os._exit(code)


def is_timeout(error: Exception) -> bool:
    """Whether a collective operation or a store operation timed out."""
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in ("timeout", "timed out"))


def is_lost_connection(error: Exception) -> bool:
    """Whether an operation failed because another rank has ended: gloo and the store raise plain RuntimeErrors."""
    gloo = ("gloo/transport", "connection closed by peer", "connection reset by peer", "broken pipe")
    texts = (*gloo, "remote process exited", "failed to recv")  # the last two: NCCL, TCPStore
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)


def check(config: RunConfig) -> None:
    """Check that a run on several machines is started by torchrun, srun or a launcher.

    Raises:
        InputError: no process is started on the other machines.
    """
    if config.num_nodes > 1 and not is_cluster_rank() and config.launcher.name == "processes":
        raise InputError(
            f"num_nodes={config.num_nodes}: start the run on every machine, for example with\n"
            f"  torchrun --nnodes={config.num_nodes} --nproc-per-node=1 --rdzv-backend=c10d "
            "--rdzv-endpoint=FIRST_HOST:29500 train.py …\n"
            f"or: srun -K --nodes={config.num_nodes} --ntasks-per-node=1 python train.py …\n"
            "or submit it to SLURM: launcher=slurm\n"
            "or train on this machine alone: num_nodes=1"
        )


def check_data(spec: PreparedSpec, data_hash: str) -> None:
    """Check that the data prepared on this machine are equal to those of rank 0.

    Raises:
        InputError: the hashes differ.
    """
    if spec.prepared.data_hash != data_hash:
        raise InputError(
            f"The data on {os.uname().nodename} differ from those of the first machine.\n"
            "Copy the same files to all machines, or set cache_dir to a shared folder."
        )
