"""Folder of sockets: data loading workers do not depend on the length of TMPDIR."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from gpt2lab.errors import InputError
from gpt2lab.system import socket_folder
from tests.conftest import ROOT

SOCKET = """
import tempfile, multiprocessing.connection
from gpt2lab.system.socket_folder import shorten_for_multiprocessing
shorten_for_multiprocessing()
multiprocessing.connection.Listener(family="AF_UNIX").close()
print(tempfile.gettempdir())
"""
LOADER = """
import tempfile
from pathlib import Path
from tests.support.tiny_run import data
loaded = data(Path("cache"))
loaded.prepare()
loaded.workers = 1
next(iter(loaded.train_dataloader()))
print(tempfile.gettempdir())
"""


@pytest.mark.parametrize("program", [SOCKET, pytest.param(LOADER, marks=pytest.mark.slow)], ids=["socket", "loader"])
@pytest.mark.parametrize("length", [40, 122])
def test_workers_load_data_with_a_long_tmpdir(program: str, length: int, tmp_path: Path):
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:
        folder = Path(parent, "x" * (length - len(parent) - 1))
        folder.mkdir()
        ended = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env={**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.strip() == str(folder), "other temporary files are where the user wants them"
        assert not list(folder.glob("pymp-*"))


def test_only_long_folders_are_an_error_with_a_fix(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(socket_folder, "SHORT_FOLDERS", ("/proc",))
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * 121)
    with pytest.raises(InputError, match="is too long: ") as error:
        socket_folder.shorten_for_multiprocessing()
    assert "Set TMPDIR to a folder whose path has at most 71 bytes" in str(error.value)
