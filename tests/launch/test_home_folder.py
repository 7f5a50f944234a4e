"""Home folder: programs work without a home directory, with a read-only one, and for a user without a name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Train, environment

PROGRAM = """
import os, getpass
from pathlib import Path
from launch import exit_codes
from gpt2lab.storage.prepared_cache import cache_folder
def report():
    from huggingface_hub import constants
    for folder in (cache_folder(), Path(constants.HF_HOME), Path("~").expanduser()):
        print(folder)
    cache_folder().mkdir(parents=True, exist_ok=True)
    (cache_folder() / "written").touch()
    getpass.getuser()
exit_codes.run_and_exit(report)
"""
NAMELESS = ("unshare", "--user", "--map-user=54321", "--map-group=54321")  # a user id that /etc/passwd lacks


def run(prefix: tuple[str, ...], tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    if prefix and subprocess.run([*prefix, "true"], env={**os.environ, **variables}, capture_output=True).returncode:
        pytest.skip(f"this machine does not permit {prefix[0]}")
    unset = ("HOME", "GPT2LAB_CACHE", "HF_HOME", "USER", "LOGNAME", "XDG_CACHE_HOME")
    plain = {name: value for name, value in os.environ.items() if name not in unset}
    command = [*prefix, sys.executable, "-c", PROGRAM]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**plain, "TMPDIR": str(tmp_path), **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("prefix", "home"),
    [((), "/proc/none"), ((), "/dev/null/none"), ((), "/sys/none"), (NAMELESS, None), (NAMELESS, "/proc")],
    ids=["missing", "below a file", "in a read-only system", "user without a name", "user without a name or HOME"],
)
def test_a_home_that_cannot_be_written_is_substituted(prefix: tuple[str, ...], home: str | None, tmp_path: Path):
    ended = run(prefix, tmp_path, **({"HOME": home} if home else {}))
    assert ended.returncode == 0, ended.stderr
    cache, hub, _ = ended.stdout.splitlines()
    assert (Path(cache) / "written").is_file()
    assert all(path.startswith(str(tmp_path / "gpt2lab-")) for path in (cache, hub))
    assert "is used instead" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_a_read_only_home_is_still_read(tmp_path: Path):
    home = tmp_path / "home"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    bind = (
        "unshare",
        "--mount",
        "sh",
        "-c",
        'mount --bind "$0" "$0"; mount -o remount,bind,ro "$0"; exec "$@"',
        str(home),
    )
    ended = run(bind, tmp_path, HOME=str(home))
    assert ended.returncode == 0, ended.stderr
    cache, hub, found_home = ended.stdout.splitlines()
    assert cache.startswith(str(tmp_path / "gpt2lab-"))
    assert (hub, found_home) == (str(home / ".cache" / "huggingface"), str(home)), "models that were downloaded earlier"


def test_a_link_in_place_of_the_substitute_is_refused(tmp_path: Path):
    """Another user may have created it in a shared folder."""
    (tmp_path / f"gpt2lab-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    ended = run((), tmp_path, HOME="/proc/none")
    assert ended.returncode == 2
    assert "belongs to another user" in ended.stderr
    assert not (tmp_path / "elsewhere").exists()


def test_folders_that_are_given_have_no_substitute(tmp_path: Path):
    given = {"HOME": "/proc/none", "GPT2LAB_CACHE": str(tmp_path / "cache"), "XDG_CACHE_HOME": str(tmp_path / "xdg")}
    ended = run((), tmp_path, **given)
    assert (ended.returncode, ended.stderr) == (0, "")
    cache, hub, _ = ended.stdout.splitlines()
    assert (cache, hub) == (given["GPT2LAB_CACHE"], f"{given['XDG_CACHE_HOME']}/huggingface")


def test_a_writable_home_is_used_without_a_message(tmp_path: Path):
    ended = run((), tmp_path, HOME=str(tmp_path / "home"))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines()[0] == str(tmp_path / "home" / ".cache" / "gpt2lab")


def test_no_temporary_folder_is_an_error_with_a_fix(tmp_path: Path):
    program = "import tempfile; tempfile._candidate_tempdir_list = lambda: ['/proc']\n" + PROGRAM
    variables = {**os.environ, "HOME": "/proc/none", "TMPDIR": "/proc"}
    variables.pop("GPT2LAB_CACHE", None)
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: No folder for temporary files can be written, neither TMPDIR=/proc nor")


def test_a_path_of_an_unknown_user_is_refused(train_here: Train, tiny: list[str]):
    keys = [key for key in tiny if not key.startswith("path=")]
    answer = train_here(*keys, "path=~no-such-user/text")
    assert answer.code == 2
    assert answer.stderr == "error: A path begins with ~, but that user has no home directory.\nWrite out the path.\n"


@pytest.mark.parametrize("keys", [[], ["-m", "seed=1,2"]], ids=["run", "sweep"])
def test_a_working_directory_that_cannot_be_used_is_refused(
    keys: list[str], train_here: Train, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir("/proc")
    answer = train_here(*tiny, *keys)
    assert answer.code == 2
    assert answer.stderr.splitlines()[0].endswith(": . cannot be written to.")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    answer = train_here(*tiny, *keys)
    assert answer.stderr == "error: The working directory no longer exists.\nChange to another one: cd FOLDER\n"


@pytest.mark.slow
def test_a_run_without_a_home_trains(cache: Path, tmp_path: Path, tiny: list[str]):
    keys = [key for key in tiny if not key.startswith("logger")]
    variables = {**environment(cache), "TMPDIR": str(tmp_path)}
    for name in ("HOME", "GPT2LAB_CACHE"):
        variables.pop(name, None)
    command = [*NAMELESS, sys.executable, str(ROOT / "train.py"), *keys, "logger=wandb", "steps=2", "run_dir=run"]
    ended = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=600)
    if "unshare" in ended.stderr:
        pytest.skip("this machine does not permit unshare")
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "run" / "report.json").is_file()
    assert "W&B: offline" in ended.stderr
