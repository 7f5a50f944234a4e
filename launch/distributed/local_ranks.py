"""Ranks: one run on several devices of this machine, each rank a process started by PyTorch's elastic multiprocessing.

The parent prepares data, makes the run directory and keeps the store that the ranks meet at; then it only waits and
hands signals on. A rank that dies takes the others with it, and so does one that keeps the others waiting too long;
`max_restarts` lets all start again from the last checkpoint. Rank 0 speaks on the terminal, the others write to
`logs/rank-N.out` and `.err` in the run directory.
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
from typing import Any, NamedTuple

from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, start_processes
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from gpt2lab.reports.run_report import read_report, watched_value
from gpt2lab.storage.atomic_files import write_json
from gpt2lab.storage.metrics_csv import read_metrics
from gpt2lab.system.heartbeat import Folder, Listener
from launch import exit_codes
from launch.config import run_dir
from launch.config.run_dir import RunDirectory
from launch.config.run_spec import PreparedSpec
from launch.distributed import child_processes
from launch.rank_environment import HEARTBEATS, OUTCOME_FILE

POLL_SECONDS = 0.2
LOGS, OUTCOME = "logs", "outcome.json"
ENDED_BY_PYTORCH = (-signal.SIGTERM, exit_codes.STOPPED)
PATIENCE = 25  # seconds: who is seen to fail so long after the first was killed by PyTorch, after 30

log = logging.getLogger(__name__)


class Failure(NamedTuple):
    """A rank that ended with an exit code other than 0."""

    rank: int
    code: int


def run(spec: PreparedSpec, directory: RunDirectory) -> dict[str, Any]:
    """Run all ranks to their end.

    Returns:
        The report that rank 0 wrote, and the watched metric.

    Raises:
        answer.Ended: with the exit code that was recorded, when the run did not finish.
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
        told = f"the ranks were stopped by {signal.Signals(signals[-1]).name}" if signals else failed
        if signals:
            _discard_untrained(directory)
        code = exit_codes.code_of_signal(signals[-1]) if signals else exit_codes.FAILED
        if (folder / "config.yaml").is_file():
            print(run_dir.kept_checkpoint_message(folder), file=sys.stderr)
        raise exit_codes.Ended(code, f"The run in {folder} failed: {told}.")
    if outcome["code"] == exit_codes.MISTAKE:
        _discard_untrained(directory)
    if outcome["code"]:
        raise exit_codes.Ended(outcome["code"], outcome["message"])
    report = read_report(folder)
    watched = watched_value(report) if outcome["watched"] is None else outcome["watched"]
    return {"watched_metric": "", **report, "watched": watched}


def record_outcome(code: int, message: str = "", watched: float | None = None) -> None:
    """Leave word of how the run ended; exit codes alone would be drowned by those of ranks that are killed.

    Rank 0 speaks for all, except that a mistake may show on any rank alone, while the others are ended.
    """
    if code == exit_codes.MISTAKE or (os.environ["RANK"] == "0" and not is_mistaken()):
        outcome = {"code": code, "message": message, "watched": watched}
        write_json(Path(os.environ[OUTCOME_FILE]), outcome)


def log_lost_connection(error: Exception, folder: Path) -> None:
    """Write the traceback of a rank that lost another one to its log file; the terminal names the rank that failed."""
    (folder / LOGS).mkdir(exist_ok=True)
    with (folder / LOGS / f"rank-{os.environ['RANK']}.err").open("a", encoding="utf-8") as file:
        traceback.print_exception(error, file=file)


def is_mistaken() -> bool:
    """Whether a rank has left word already of a mistake."""
    file = Path(os.environ[OUTCOME_FILE])
    return file.exists() and json.loads(file.read_text())["code"] == exit_codes.MISTAKE


def record_failure() -> None:
    """Leave word of when this rank failed. Others fail of it in the same second, and PyTorch tells whole seconds."""
    Path(os.environ[HEARTBEATS], f"failed-{os.environ['RANK']}").write_text(str(time.time()))


def _first(failures: list[ProcessFailure], scratch: Path) -> ProcessFailure | None:
    """The failure that the others follow from, if there is any."""
    seen = min((failure.timestamp for failure in failures), default=0)
    # PyTorch asks the ranks that are left to end, and kills who does not within half a minute.
    own = [one for one in failures if one.exitcode not in ENDED_BY_PYTORCH and one.timestamp < seen + PATIENCE]
    # A rank that was killed did not fail of the others, who may have failed of its death.
    ordered = sorted(own or failures, key=lambda one: (one.exitcode >= 0, _failed_at(one, scratch)))
    return ordered[0] if ordered else None


def _failed_at(failure: ProcessFailure, scratch: Path) -> float:
    """Seconds since 1970: by the rank's own word, else by PyTorch's, in whole seconds."""
    word = scratch / f"failed-{failure.local_rank}"
    return float(word.read_text()) if word.is_file() else float(failure.timestamp)


def _attempt(spec: PreparedSpec, folder: Path) -> tuple[str, list[int], dict[str, Any] | None]:
    """(which rank failed and how, signals that came, recorded outcome or None) of one start of all ranks."""
    with tempfile.TemporaryDirectory(prefix="gpt2lab-ranks-") as scratch:
        failed, signals, blame = _start_and_wait(spec, folder, Path(scratch))
        outcome_file = Path(scratch, OUTCOME)
        outcome = json.loads(outcome_file.read_text()) if outcome_file.is_file() else None
        if failed and not signals and outcome and outcome["code"] in (exit_codes.STOPPED, exit_codes.INTERRUPTED):
            outcome = None  # rank 0 was ended because another had failed, which is no wish to stop
        if outcome is None and not (failed or signals or blame):
            outcome = {
                "code": exit_codes.FINISHED,
                "message": "",
                "watched": None,
            }  # there was no disk space to write it
        return blame or _told(failed, folder), signals, outcome


def _discard_untrained(directory: RunDirectory) -> None:
    """Leave nothing behind of a new run that ended before its first logged step."""
    assert directory.path is not None
    if not read_metrics(directory.path) and not (directory.path / "checkpoints").exists():
        directory.discard()


def _told(failed: Failure | None, folder: Path) -> str:
    """Which rank failed, and of what, or the last line that it wrote."""
    if failed is None:
        return "the ranks ended without a word"
    died = f"was killed by {signal.Signals(-failed.code).name}" if failed.code < 0 else f"ended with code {failed.code}"
    log_file = folder / LOGS / f"rank-{failed.rank}.err"
    lines = log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log_file.is_file() else []
    if failed.code < 0:
        last = lines[-1:]
    elif failed.rank == 0:  # it spoke on the terminal
        last = read_report(folder).get("error", "").splitlines()
    else:
        last = _last_words(lines)
    return f"rank {failed.rank} {died}{': ' + ' '.join(last).rstrip('.') if last else ''}"


def _last_words(lines: list[str]) -> list[str]:
    """Of what a rank wrote: what stands below a traceback, or the error that it told without one."""
    last = list(takewhile(lambda line: not line.startswith(" "), reversed(lines)))[::-1]
    told = [number for number, line in enumerate(last) if line.startswith("error: ")]
    return [last[told[-1]].removeprefix("error: "), *last[told[-1] + 1 :]] if told else last


class RankLogs(LogsSpecs):
    """Where the ranks' output goes: rank 0's to the terminal, the others' to files."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """The files, by local rank; an empty name is the terminal."""
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
        """The folder."""
        return str(self.folder)


def _start_and_wait(spec: PreparedSpec, folder: Path, scratch: Path) -> tuple[Failure | None, list[int], str]:
    """(the first rank that failed or None, signals that came, which rank kept the others waiting)."""
    world = spec.machine.world_size
    # The store listens before any rank starts and picks its own free port, so no two runs can collide.
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
        "PYTHONPATH": child_processes.environment()["PYTHONPATH"],
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
        # After the start: it installs handlers of its own, which would end the ranks instead of letting them save.
        with child_processes.forwarding(
            lambda number: child_processes.send(number, context.pids().values())
        ) as signals:
            result, blame, listener = None, "", Listener(Folder(scratch), list(range(world)))
            while result is None:
                result = context.wait(POLL_SECONDS)
                listener.listen(longest_gap=10 * POLL_SECONDS)
                if result is None and not blame and listener.silent(spec.config.rank_timeout):
                    blame = _end_silent(listener, spec.config.rank_timeout, context.pids())
    finally:
        context.close()
    first = _first(list(result.failures.values()), scratch)
    aborted = first is not None and first.exitcode == -signal.SIGABRT  # how NCCL gives up
    listener.listen(longest_gap=0.0)
    blame = blame or listener.blame(listener.behind(aborted), spec.config.rank_timeout)
    return (Failure(first.local_rank, first.exitcode) if first else None), signals, blame


def _end_silent(listener: Listener, seconds: int, pids: dict[int, int]) -> str:
    """Kill the ranks that fell silent; the others then lose their connection and end by themselves."""
    silent = listener.silent(seconds)
    blame = listener.blame(listener.behind() or silent, seconds)  # who has given up may be long in ending
    for rank in silent:
        os.kill(pids[rank], signal.SIGKILL)
    return blame
