"""Ranks: one run on several devices of this machine, each rank a process started by PyTorch's elastic multiprocessing.

The parent prepares data, makes the run directory and keeps the store that the ranks meet at; then it only waits and
hands signals on. A rank that dies takes the others with it; `max_restarts` lets all start again from the last
checkpoint. Rank 0 speaks on the terminal, the others write to `logs/rank-N.out` and `.err` in the run directory.
"""

import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, start_processes

from gpt2lab.atomic_files import write_json
from gpt2lab.checkpoint_ledger import newest_good_checkpoint
from launch import answer
from launch.configuration import config
from launch.configuration.config import Config
from launch.running import children, run_folders

ROOT = Path(__file__).parents[2]
POLL_SECONDS = 0.2
LOGS = "logs"

log = logging.getLogger(__name__)


class Failure(NamedTuple):
    """A rank that ended with an exit code other than 0."""

    rank: int
    code: int


def run(settings: Config, is_new: bool) -> dict[str, Any]:
    """Run all ranks to their end.

    Returns:
        The report that rank 0 wrote, and the watched metric.

    Raises:
        answer.Ended: with the exit code that was recorded, when the run did not finish.
    """
    folder = run_folders.make(settings) if is_new else Path(settings.run_dir or "")
    settings.run_dir = str(folder)
    config.save(settings, folder / "config.yaml")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    for restarts in range(settings.max_restarts + 1):
        failed, signals, outcome = _attempt(settings, folder)
        if outcome is not None or signals or restarts == settings.max_restarts:
            break
        log.warning("%s. Restart %d of %d.", _told(failed, folder), restarts + 1, settings.max_restarts)
        _take_up_again(settings, folder)
    if outcome is None:
        told = "The ranks were stopped by a signal" if signals else _told(failed, folder)
        run_folders.remove_if_untrained(folder, is_new)
        code = answer.code_of_signal(signals[-1]) if signals else answer.FAILED
        raise answer.Ended(code, f"The run in {folder} failed. {told}.")
    if outcome["code"] == answer.MISTAKE:
        run_folders.remove_if_untrained(folder, is_new)
    if outcome["code"]:
        raise answer.Ended(outcome["code"], outcome["message"])
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return {**report, "watched": outcome["watched"]}


def record_outcome(code: int, message: str = "", watched: float | None = None) -> None:
    """Leave word of how the run ended; exit codes alone would be drowned by those of ranks that are killed.

    Rank 0 speaks for all, except that a mistake may show on any rank alone, while the others lose their connection.
    """
    if os.environ["RANK"] == "0" or code == answer.MISTAKE:
        outcome = {"code": code, "message": message, "watched": watched}
        write_json(Path(os.environ["GPT2LAB_OUTCOME"]), outcome)


def _attempt(settings: Config, folder: Path) -> tuple[Failure | None, list[int], dict[str, Any] | None]:
    """(first rank that failed or None, signals that came, recorded outcome or None) of one start of all ranks."""
    with tempfile.TemporaryDirectory(prefix="gpt2lab-ranks-") as scratch:
        outcome_file = Path(scratch, "outcome.json")
        failed, signals = _start_and_wait(settings, folder, outcome_file)
        return failed, signals, json.loads(outcome_file.read_text()) if outcome_file.is_file() else None


def _take_up_again(settings: Config, folder: Path) -> None:
    """Let the next start go on from the newest whole checkpoint; without one it begins at step 0."""
    if newest_good_checkpoint(folder) is None:
        shutil.rmtree(folder)
        folder.mkdir()
    else:
        settings.resume = str(folder)
    config.save(settings, folder / "config.yaml")


def _told(failed: Failure | None, folder: Path) -> str:
    """Which rank failed, and the last line that it wrote."""
    if failed is None:
        return "The ranks ended without a word"
    died = f"was killed by {signal.Signals(-failed.code).name}" if failed.code < 0 else f"ended with code {failed.code}"
    log_file = folder / LOGS / f"rank-{failed.rank}.err"
    lines = log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log_file.is_file() else []
    return f"Rank {failed.rank} {died}{': ' + lines[-1] if lines else ''}"


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


def _start_and_wait(settings: Config, folder: Path, outcome_file: Path) -> tuple[Failure | None, list[int]]:
    """(the first rank that failed or None, signals that came)."""
    world = settings.record.world_size
    # The store listens before any rank starts and picks its own free port, so no two runs can collide.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "GROUP_RANK": "0",
        "GPT2LAB_OUTCOME": str(outcome_file),
        "OMP_NUM_THREADS": str(settings.threads),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    arguments = ("-m", "launch.running.job", str(folder / "config.yaml"), str(os.getpid()), "--rank")
    context = start_processes(
        name="rank",
        entrypoint=sys.executable,
        args=dict.fromkeys(range(world), arguments),
        envs={rank: {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)},
        logs_specs=RankLogs(folder / LOGS),
    )
    try:
        # After the start: it installs handlers of its own, which would end the ranks instead of letting them save.
        with children.forwarding(lambda: list(context.pids().values())) as signals:
            result = None
            while result is None:
                result = context.wait(POLL_SECONDS)
    finally:
        context.close()
    first = min(result.failures.values(), key=lambda failure: failure.timestamp, default=None)
    return (Failure(first.local_rank, first.exitcode) if first else None), signals
