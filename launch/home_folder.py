"""Home folder: substitutes for folders of the home directory that cannot be created, and for a user without a name.

Containers often run with a user id that has neither a home directory nor a name, or with a read-only one.
"""

import getpass
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from gpt2lab.errors import InputError
from gpt2lab.storage.atomic_files import can_write

# Environment variable → the folder that a library uses without it, below the home directory
FOLDERS = {"GPT2LAB_CACHE": ".cache/gpt2lab", "HF_HOME": ".cache/huggingface", "WANDB_CACHE_DIR": ".cache/wandb"}
FOLDERS |= {"WANDB_CONFIG_DIR": ".config/wandb", "WANDB_DATA_DIR": ".local/share/wandb", "TRITON_HOME": "."}
# Environment variable → the one of the XDG standard that its library reads too
XDG = {"HF_HOME": "XDG_CACHE_HOME", "WANDB_CACHE_DIR": "XDG_CACHE_HOME"}
XDG |= {"WANDB_CONFIG_DIR": "XDG_CONFIG_HOME", "WANDB_DATA_DIR": "XDG_DATA_HOME"}
READ_ONLY = ("HF_HOME", "WANDB_CONFIG_DIR")  # useful even so: downloaded models, a login


def substitute_unwritable() -> None:
    """Set an environment variable for each folder that cannot be created; print one line that names the substitute.

    Child processes inherit the variables, so all processes of a run use the same folders.

    Raises:
        InputError: no folder for temporary files can be written, or the substitute belongs to another user.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # libraries name folders after the user
        os.environ["USER"] = str(os.getuid())
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 — Path.home() fails without a home directory
    missing = {
        name: folder
        for name, folder in FOLDERS.items()
        if not {name, XDG.get(name)} & set(os.environ) and not (name in READ_ONLY and (home / folder).is_dir())
    }
    missing = {name: folder for name, folder in missing.items() if not _can_create(home / folder)}
    if not missing:
        return
    substitute = _own_temporary_folder()
    os.environ |= {name: str(substitute / folder) for name, folder in missing.items()}
    if not home.is_dir():
        os.environ["HOME"] = str(substitute)
    if "GPT2LAB_CACHE" in missing:
        reason = f"The home directory {home} cannot be written" if home.is_absolute() else "There is no home directory"
        print(
            f"{reason}, so {substitute} is used instead. To keep prepared data, set cache_dir=FOLDER or GPT2LAB_CACHE.",
            file=sys.stderr,
        )


def _can_create(folder: Path) -> bool:
    """Whether a folder, or the nearest parent that exists, can be written."""
    if not folder.is_absolute():  # `~` without a home directory
        return False
    return can_write(next(path for path in (folder, *folder.parents) if os.path.lexists(path)))


def _own_temporary_folder() -> Path:
    """Create a folder for temporary files that only this user can use, or return the one of an earlier run."""
    folder = Path(temporary_folder(), f"gpt2lab-{os.getuid()}")
    with suppress(FileExistsError):  # also of a file or a link
        folder.mkdir(mode=0o700)
    if not folder.is_dir() or folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise InputError(
            f"{folder} belongs to another user.\nSet the environment variable HOME to a folder that you can write."
        )
    return folder


def temporary_folder() -> str:
    """Return the folder for temporary files.

    Raises:
        InputError: none can be written.
    """
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:
        given = os.environ.get("TMPDIR", "")
        raise InputError(
            f"No folder for temporary files can be written, neither TMPDIR={given} nor /tmp.\n"
            "Set the environment variable TMPDIR to a folder that you can write."
        ) from None
