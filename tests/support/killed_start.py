"""Kill train.py at each of its file operations in turn, and restart it each time.

    python tests/support/killed_start.py FOLDER FIRST LAST OVERRIDE…

For every n from FIRST to LAST, a fork of this process runs train.py with `run_dir=FOLDER/n/run` and is killed with
SIGKILL before its n-th operation that changes a file below FOLDER/n. Then `resume=auto` runs there and `resume=run` in
a copy. Prints one JSON line for each n: {"n", "killed", "left", "auto", "resume"} with exit codes; `resume` is null
where no directory was left. Ends early once a run was not killed.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.truncate", "shutil.rmtree")


def die_at(number: int, below: Path) -> None:
    """Have this process kill itself before its `number`-th change of a file below a folder."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not is_write and event not in CHANGES:
            return
        named = [os.fsdecode(path) for path in arguments[:2] if isinstance(path, str | bytes | os.PathLike)]
        if any(Path(path).absolute().is_relative_to(below) for path in named):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def in_fork(action: Callable[[], int], output: Path) -> int:
    """Return the exit code of `action` in a fork with output to a file; a negative one is a signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with output.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os._exit(action())


def main(folder: Path, first: int, last: int, overrides: list[str]) -> None:
    import lightning  # noqa: F401 — once, before the forks
    import transformers  # noqa: F401

    import train
    from launch import exit_codes
    from launch.distributed import local_ranks  # noqa: F401
    from launch.run import job  # noqa: F401

    def run(*own: str) -> int:
        sys.argv = ["train.py", *overrides, *own]
        return exit_codes.exit_code(train.command_line)

    for number in range(first, last + 1):
        below = folder / str(number)
        below.mkdir(parents=True)
        os.chdir(below)

        def start(number: int = number, below: Path = below) -> int:
            die_at(number, below)
            return run("run_dir=run")

        killed = in_fork(start, folder / "start.txt")
        left = Path("run").exists()
        if left:
            shutil.copytree("run", "copy", symlinks=True)
        row = {"n": number, "killed": killed == -signal.SIGKILL, "left": left}
        row["auto"] = in_fork(lambda: run("run_dir=run", "resume=auto"), folder / "auto.txt")
        row["resume"] = in_fork(lambda: run_resume(), folder / "resume.txt") if left else None
        print(json.dumps(row), flush=True)
        if not row["killed"]:
            return

    return


def run_resume() -> int:
    import train
    from launch import exit_codes

    sys.argv = ["train.py", "resume=copy"]
    return exit_codes.exit_code(train.command_line)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
