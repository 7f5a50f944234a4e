"""Local ranks: runs on several devices of this machine, with one process per rank (torch elastic multiprocessing).

The parent process prepares the data, creates the run directory and hosts the TCPStore for the rendezvous; then it waits
and forwards signals. All ranks end when one fails or exceeds `rank_timeout`; with `max_restarts` they restart from the
last checkpoint. Rank 0 prints to the terminal, the others to `logs/rank-N.out` and `.err` in the run directory.
"""

import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from itertools import takewhile
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, start_processes
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from gpt2lab.storage.atomic_files import write_json
from gpt2lab.storage.metrics_csv import read_metrics
from gpt2lab.storage.report_json import read_report, watched_value
from gpt2lab.system.heartbeat import FolderBoard, Listener
from launch import exit_codes
from launch.config import run_dir
from launch.config.run_dir import RunDirectory
from launch.config.run_spec import PreparedSpec
from launch.distributed import child_processes
from launch.rank_environment import HEARTBEATS, OUTCOME_FILE

POLL_SECONDS = 0.2
LOGS, OUTCOME = "logs", "outcome.json"
ENDED_BY_PYTORCH = (-signal.SIGTERM, exit_codes.STOPPED)
KILL_WINDOW = 25  # seconds: a rank that fails later than this after the first was killed by PyTorch (after 30)

log = logging.getLogger(__name__)


def run(spec: PreparedSpec, directory: RunDirectory) -> dict[str, Any]:
    """Start all ranks and wait until they end.

    Returns:
        The report of rank 0, with the watched metric.

    Raises:
        exit_codes.Exit: the run did not finish; `code` is the recorded exit code.
    """
    folder = directory.enter(spec, is_resumed=directory.newest_checkpoint() is not None)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    for restarts in range(spec.config.max_restarts + 1):
        failed, signals, outcome = _attempt(spec, folder)
        if outcome is not None or signals or restarts == spec.config.max_restarts:
            break
        log.warning("%s. Restart %d of %d.", failed, restarts + 1, spec.config.max_restarts)
        if directory.newest_checkpoint() is None:  # else the ranks resume from it
            directory.restart(spec)
    if outcome is None:
        reason = f"the ranks were stopped by {signal.Signals(signals[-1]).name}" if signals else failed
        if signals:
            _discard_untrained(directory)
        code = exit_codes.signal_exit_code(signals[-1]) if signals else exit_codes.FAILED
        if (folder / "config.yaml").is_file():
            print(run_dir.kept_checkpoint_message(folder, spec.config.steps), file=sys.stderr)
        raise exit_codes.Exit(code, f"The run in {folder} failed: {reason}.")
    if outcome["code"] == exit_codes.USER_ERROR:
        _discard_untrained(directory)
    if outcome["code"]:
        raise exit_codes.Exit(outcome["code"], outcome["message"])
    report = read_report(folder)
    watched = watched_value(report) if outcome["watched"] is None else outcome["watched"]
    return {"watched_metric": "", **report, "watched": watched}


def record_outcome(code: int, message: str = "", watched: float | None = None) -> None:
    """Write the outcome of the run to a file, because the exit codes of killed ranks would hide it.

    Rank 0 writes it, except a user error, which may occur on any rank.
    """
    if code == exit_codes.USER_ERROR or (os.environ["RANK"] == "0" and not has_user_error()):
        outcome = {"code": code, "message": message, "watched": watched}
        write_json(Path(os.environ[OUTCOME_FILE]), outcome)


def log_lost_connection(error: Exception, folder: Path) -> None:
    """Append the traceback of a lost connection to this rank's log file; the terminal shows only the cause."""
    (folder / LOGS).mkdir(exist_ok=True)
    with (folder / LOGS / f"rank-{os.environ['RANK']}.err").open("a", encoding="utf-8") as file:
        traceback.print_exception(error, file=file)


def has_user_error() -> bool:
    """Whether a rank has recorded a user error."""
    file = Path(os.environ[OUTCOME_FILE])
    return file.exists() and json.loads(file.read_text(encoding="utf-8"))["code"] == exit_codes.USER_ERROR


def record_failure() -> None:
    """Write the time of this rank's failure: PyTorch rounds to seconds, and other ranks fail within the same second."""
    Path(os.environ[HEARTBEATS], f"failed-{os.environ['RANK']}").write_text(str(time.time()), encoding="utf-8")


def _root_cause(failures: list[ProcessFailure], scratch: Path) -> ProcessFailure | None:
    """The failure that caused the others, or None."""
    first_seen = min((failure.timestamp for failure in failures), default=0)
    # PyTorch sends SIGTERM to the remaining ranks, and SIGKILL to those that run 30 seconds later.
    own = [one for one in failures if one.exitcode not in ENDED_BY_PYTORCH and one.timestamp < first_seen + KILL_WINDOW]
    # A killed rank comes first: its death may have caused the failures of others, but not the reverse.
    return min(own or failures, key=lambda one: (one.exitcode >= 0, _failure_time(one, scratch)), default=None)


def _failure_time(failure: ProcessFailure, scratch: Path) -> float:
    """Unix time in seconds: as the rank recorded it, otherwise PyTorch's, rounded to seconds."""
    file = scratch / f"failed-{failure.local_rank}"
    return float(file.read_text()) if file.is_file() else float(failure.timestamp)


def _attempt(spec: PreparedSpec, folder: Path) -> tuple[str, list[int], dict[str, Any] | None]:
    """Start all ranks once; return (failure message, received signals, recorded outcome or None)."""
    with tempfile.TemporaryDirectory(prefix="gpt2lab-ranks-") as scratch:
        failed, signals, late_message = _start_and_wait(spec, folder, Path(scratch))
        outcome_file = Path(scratch, OUTCOME)
        outcome = json.loads(outcome_file.read_text(encoding="utf-8")) if outcome_file.is_file() else None
        if failed and not signals and outcome and outcome["code"] in (exit_codes.STOPPED, exit_codes.INTERRUPTED):
            outcome = None  # PyTorch stopped rank 0 because another rank failed; no user stopped the run
        if outcome is None and not (failed or signals or late_message):
            # The ranks finished, but the disk had no space for the outcome file.
            outcome = {"code": exit_codes.FINISHED, "message": "", "watched": None}
        return late_message or _failure_message(failed, folder), signals, outcome


def _discard_untrained(directory: RunDirectory) -> None:
    """Delete the directory of a new run that ended before its first logged step."""
    assert directory.path is not None
    if not read_metrics(directory.path) and not (directory.path / "checkpoints").exists():
        directory.discard()


def _failure_message(failed: ProcessFailure | None, folder: Path) -> str:
    """Format which rank failed and its error, or the last line of its stderr."""
    if failed is None:
        return "the ranks ended without an error message"
    rank, code = failed.local_rank, failed.exitcode
    died = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    log_file = folder / LOGS / f"rank-{rank}.err"
    lines = log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log_file.is_file() else []
    if code < 0:
        last = lines[-1:]
    elif rank == 0:  # its stderr is the terminal
        last = read_report(folder).get("error", "").splitlines()
    else:
        last = _error_lines(lines)
    return f"rank {rank} {died}{': ' + ' '.join(last).rstrip('.') if last else ''}"


def _error_lines(lines: list[str]) -> list[str]:
    """The lines below a traceback, or from the last `error: ` on."""
    last = list(takewhile(lambda line: not line.startswith(" "), reversed(lines)))[::-1]
    errors = [number for number, line in enumerate(last) if line.startswith("error: ")]
    return [last[errors[-1]].removeprefix("error: "), *last[errors[-1] + 1 :]] if errors else last


class RankLogs(LogsSpecs):
    """Output destinations of the ranks: the terminal for rank 0, files for the others."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Return the file names by local rank; an empty name is the terminal."""
        self.folder.mkdir(exist_ok=True)
        ranks = {local: env["RANK"] for local, env in envs.items()}
        out, err = (
            {local: str(self.folder / f"rank-{rank}.{end}") if rank != "0" else "" for local, rank in ranks.items()}
            for end in ("out", "err")
        )
        nowhere = dict.fromkeys(envs, "")
        return LogsDest(out, err, nowhere, nowhere, nowhere)

    @property
    def root_log_dir(self) -> str:
        """The folder of the log files."""
        return str(self.folder)


def _start_and_wait(spec: PreparedSpec, folder: Path, scratch: Path) -> tuple[ProcessFailure | None, list[int], str]:
    """Run all ranks once; return (first failed rank or None, received signals, message about late ranks or "")."""
    world = spec.machine.world_size
    # The store picks a free port and listens before any rank starts, so two runs cannot collide.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "GROUP_RANK": "0",
        OUTCOME_FILE: str(scratch / OUTCOME),
        HEARTBEATS: str(scratch),
        "OMP_NUM_THREADS": str(spec.machine.threads),
        **child_processes.module_path(),
    }
    allowed = ("--allow-targets", ",".join(spec.config.allow_targets))
    arguments = ("-P", "-m", "launch.run.job", str(folder / "config.yaml"), str(os.getpid()), "--rank", *allowed)
    context = start_processes(
        name="rank",
        entrypoint=sys.executable,
        args=dict.fromkeys(range(world), arguments),
        envs={rank: {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)},
        logs_specs=RankLogs(folder / LOGS),
    )
    try:
        # Only now: start_processes installs signal handlers that would end the ranks before they can save.
        with child_processes.forward_signals(
            lambda number: child_processes.send(number, context.pids().values())
        ) as signals:
            result, late_message, listener = None, "", Listener(FolderBoard(scratch), list(range(world)))
            while result is None:
                result = context.wait(POLL_SECONDS)
                listener.poll(longest_gap=10 * POLL_SECONDS)
                if result is None and not late_message and listener.silent_ranks(spec.config.rank_timeout):
                    late_message = _kill_silent(listener, spec.config.rank_timeout, context.pids())
    finally:
        context.close()
    first = _root_cause(list(result.failures.values()), scratch)
    aborted = first is not None and first.exitcode == -signal.SIGABRT  # by NCCL, after a timeout
    listener.poll(longest_gap=0.0)
    late_message = late_message or listener.late_message(listener.late_ranks(aborted), spec.config.rank_timeout)
    return first, signals, late_message


def _kill_silent(listener: Listener, seconds: int, pids: dict[int, int]) -> str:
    """Kill the ranks without a heartbeat, so that the others lose their connection and end; return the message."""
    silent = listener.silent_ranks(seconds)
    late = listener.late_ranks() or silent  # a rank that timed out may still be ending
    for rank in silent:
        os.kill(pids[rank], signal.SIGKILL)
    return listener.late_message(late, seconds)
