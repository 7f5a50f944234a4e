"""Folder of Unix sockets: a short substitute for a long TMPDIR, since the path of a socket has at most 107 bytes."""

import multiprocessing.util
import os
import tempfile
from pathlib import Path

from gpt2lab.errors import InputError
from gpt2lab.storage.atomic_files import can_write

LONGEST_SOCKET = 107  # bytes, sun_path of unix(7) without the final NUL; macOS: 103
OWN_PART = len("/pymp-abcdefgh/listener-abcdefgh") + 4  # of multiprocessing; 4 for macOS
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run/shm")


def shorten_for_multiprocessing() -> None:
    """Set the folder in which multiprocessing creates sockets; a data loading worker cannot send its batches otherwise.

    Raises:
        InputError: TMPDIR is too long, and no shorter folder can be written.
    """
    given = tempfile.gettempdir()
    tempfile.tempdir = short_folder(OWN_PART)
    try:
        multiprocessing.util.get_temp_dir()  # created at the first call, and removed when this process ends
    finally:
        tempfile.tempdir = given


def short_folder(own_part: int) -> str:
    """Return the folder for temporary files, or a shorter one in which sockets can be created.

    Args:
        own_part: bytes of the path of a socket below that folder.

    Raises:
        InputError: none of them is short enough and can be written.
    """
    given = tempfile.gettempdir()
    for folder in (given, *SHORT_FOLDERS):
        if len(os.fsencode(folder)) + own_part <= LONGEST_SOCKET and can_write(Path(folder)):
            return folder
    raise InputError(
        f"TMPDIR={given} is too long: sockets in it would have paths of more than {LONGEST_SOCKET} bytes.\n"
        f"Set TMPDIR to a folder whose path has at most {LONGEST_SOCKET - own_part} bytes."
    )
