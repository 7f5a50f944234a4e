"""Fixtures for the tests of train.py: the real conf/, shrunk to a model and a text of seconds."""

import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import hydra_cache
from tests.support.sources import write_sources

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Threads that spin while they wait occupy the cores of a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

SHRUNK = (
    "model.n_layer=2",
    "model.n_head=2",
    "model.n_embd=32",
    "model.n_positions=64",
    "context=32",
    "vocab_size=300",
)
SHRUNK += ("batch_tokens=256", "precision=fp32", "data=text", "logger=none", "callbacks=minimal", "val_fraction=0.3")


@dataclass
class Answer:
    """The result of a command."""

    code: int
    stdout: str
    stderr: str


# A rank on a CPU has a core of its own; train.py refuses more ranks than there are cores.
needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")

Command = Train = Distil = Callable[..., Answer]


def in_words(loss: Any) -> str:
    """Return the id of a loss: the fields that differ from the defaults."""
    if loss is None:
        return "cross_entropy"
    usual = vars(type(loss)(loss.name))
    changed = [f"{name}={value}" for name, value in vars(loss).items() if value != usual[name]]
    return ",".join([loss.name, *changed])


@pytest.fixture(scope="session", autouse=True)
def cached_composition() -> Iterator[None]:
    """Hydra's composition, cached in this process."""
    with pytest.MonkeyPatch.context() as patch:
        hydra_cache.install(patch)
        yield


@pytest.fixture(scope="session")
def peak_measured_once() -> Iterator[None]:
    """The peak FLOP/s of this machine, measured once a process though runs measure it for each cache folder."""
    from gpt2lab.system import device

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "_measure", functools.cache(device._measure))
        yield


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the beginnings of a few real Python files."""
    folder = tmp_path_factory.mktemp("sources")
    write_sources(folder)
    return folder


@pytest.fixture(scope="session")
def whole_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a few whole Python files, for tests whose weights must have learned more."""
    folder = tmp_path_factory.mktemp("whole")
    write_sources(folder, ("heapq", "bisect", "textwrap", "shlex", "string", "queue"), 10**6)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all runs of a test session, as on a user's machine."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny(sources: Path) -> list[str]:
    """Overrides that make any run small."""
    return [*SHRUNK, f"path={sources}"]


def command_here(
    program: str, main: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Command:
    """Return a program in this process: the same as from the shell, without the seconds of imports."""
    from launch import exit_codes

    def run(*words: str) -> Answer:
        monkeypatch.setattr(sys, "argv", [str(ROOT / program), *words])
        capfd.readouterr()
        code = exit_codes.exit_code(main)
        return Answer(code, *capfd.readouterr())

    return run


@pytest.fixture
def train_here(
    peak_measured_once: None,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Train:
    """train.py in this process, in an empty folder."""
    import train

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPT2LAB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return command_here("train.py", train.command_line, monkeypatch, capfd)


@pytest.fixture
def evaluate_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """evaluate.py in this process, in the current folder."""
    import evaluate

    return command_here("evaluate.py", evaluate.main, monkeypatch, capfd)


class JobHere:
    """A job of a sweep that has run in this process, without the seconds of imports of a JobProcess."""

    is_running = False

    def __init__(self, config: Any, slot: Any = None, *_files: Path | None) -> None:
        from launch import exit_codes
        from launch.run import job

        self.slot, self._outcome = slot, (0, "")
        try:
            job.run(config)
        except Exception as error:
            self._outcome = 2 if exit_codes.as_input_error(error) else 1, str(error)

    def signal(self, number: int) -> None:
        """Do nothing: the job has ended."""

    def wait(self) -> tuple[int, str]:
        return self._outcome

    ended = wait


class StartCheckHere:
    """The check of the starts of a sweep's jobs, made in this process."""

    def __init__(self, configs: Sequence[Any], _slot: Any) -> None:
        from launch.run import job

        self._error = job.common_start_error(configs)

    def signal(self, number: int) -> None:
        """Do nothing: the check has ended."""

    def wait(self) -> tuple[int, str]:
        return 0, self._error


@pytest.fixture
def start_check_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the starts of a sweep's jobs is made in this process."""
    from launch.sweep import job_process

    monkeypatch.setattr(job_process, "StartCheck", StartCheckHere)


@pytest.fixture
def jobs_here(start_check_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of sweeps and studies run in this process, one after the other."""
    from launch.sweep import job_process, jobs

    for module in (job_process, jobs):
        monkeypatch.setattr(module, "JobProcess", JobHere)


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the one teacher of a test session, which each test copies."""
    return tmp_path_factory.mktemp("teachers")


@pytest.fixture
def distil(train_here: Train, tiny: list[str], tmp_path: Path, teachers: Path) -> Distil:
    """Distil from a teacher in ./teacher with a separate cache folder."""
    wide = [key for key in tiny if not key.startswith(("model.n_head", "model.n_embd"))]
    if not (teachers / "teacher").exists():
        assert train_here(*wide, "model.n_head=4", "model.n_embd=64", "steps=30", "run_dir=teacher").code == 0
        shutil.copytree("teacher", teachers / "teacher")
    else:
        shutil.copytree(teachers / "teacher", tmp_path / "teacher")

    def run(*overrides: str, without: tuple[str, ...] = (), code: int = 0) -> Answer:
        given = ("task=distill", "teacher=teacher", f"cache_dir={tmp_path / 'cache'}", "steps=4", "seed=1")
        answer = train_here(*(key for key in tiny if not key.startswith(without)), *given, *overrides)
        assert answer.code == code, answer.stderr
        return answer

    return run


@pytest.fixture
def train_process(tmp_path: Path, cache: Path) -> Train:
    """Run train.py as a separate process in an empty folder."""

    def run(*overrides: str) -> Answer:
        ended = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *overrides],
            cwd=tmp_path,
            env=environment(cache),
            capture_output=True,
            text=True,
        )
        return Answer(ended.returncode, ended.stdout, ended.stderr)

    return run


def started(cache: Path, folder: Path, *overrides: str, **variables: str) -> subprocess.Popen[str]:
    """Start train.py in a folder, with these extra variables; it receives Ctrl-C as in a terminal."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *overrides],
        cwd=folder,
        env={**environment(cache), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A process started in a shell's background ignores Ctrl-C; a user's does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def environment(cache: Path) -> dict[str, str]:
    """Return the environment of a separate process, which also has a separate W&B service."""
    inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    return {**inherited, "GPT2LAB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
