"""Preparation of a corpus in real processes: killed half way, on a full disk, by two processes at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.chaos

PROGRAM = """
import resource, sys
from gpt2lab.errors import InputError
from gpt2lab.settings import TokenizerChoice
from datamodules.language_modeling import LanguageModelingData
path, tokenizer, cache, limit = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
data = LanguageModelingData(
    name="text", source="text", path=path, tokenizer=TokenizerChoice("pretrained", source=tokenizer), context=64,
    batch_sequences=8, accumulate=1, seed=1, cache_dir=cache,
)
try:
    facts = data.prepare()
    print(facts.hash, facts.train_tokens, facts.val_tokens, facts.val_bytes)
except InputError as error:
    print("refused:", error)
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six megabytes of source code, which take seconds to tokenize."""
    folder = tmp_path_factory.mktemp("text")
    modules = sorted(Path(os.__file__).parent.glob("*.py"))
    everything = "".join(module.read_text(errors="replace") for module in modules)
    (folder / "long.txt").write_text((everything * 2)[:6_000_000])
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gpt2lab.data.tokenizer import train_bpe

    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(iter([Path(os.__file__).read_text()]), 300).save_pretrained(folder)
    return folder


def start(text: Path, tokenizer: Path, cache: Path, limit: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, str(text), str(tokenizer), str(cache), str(limit)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def token_folders(cache: Path) -> list[Path]:
    return [entry for entry in (cache / "tokens").iterdir() if entry.is_dir()]


def test_preparation_after_a_kill_equals_an_undisturbed_one(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    killed = start(text, tokenizer, tmp_path / "cache")
    deadline = time.monotonic() + 60
    while not any(file.stat().st_size for file in (tmp_path / "cache").glob("tokens/.*/train.bin")):
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (left,) = token_folders(tmp_path / "cache")
    assert not (left / "ledger.json").exists()
    outputs = []
    for cache in (tmp_path / "cache", tmp_path / "unbroken"):
        outputs.append(start(text, tokenizer, cache).communicate(timeout=100)[0])
    assert outputs[0] == outputs[1]
    assert not outputs[0].startswith("refused")
    assert not left.exists()


def test_full_disk_is_an_error_and_leaves_no_files(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    output, _ = start(text, tokenizer, tmp_path / "cache", limit=1_000_000).communicate(timeout=100)
    assert output.startswith("refused: No space left")
    assert str(tmp_path / "cache") in output
    assert "cache_dir=" in output
    assert len(output.splitlines()) <= 5
    assert token_folders(tmp_path / "cache") == []


def test_concurrent_runs_prepare_once(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    both = [start(text, tokenizer, tmp_path / "cache") for _ in range(2)]
    outputs = [process.communicate(timeout=100)[0] for process in both]
    assert outputs[0] == outputs[1]
    assert len(token_folders(tmp_path / "cache")) == 1


def test_unwritable_cache_is_refused(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    output, _ = start(text, tokenizer, tmp_path / "file").communicate(timeout=100)
    assert output.startswith("refused: Cannot write prepared data")
    assert "cache_dir=" in output
