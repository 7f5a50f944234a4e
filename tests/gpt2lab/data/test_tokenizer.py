"""Tokenizers: copied into the cache, hashed by their behaviour, with special tokens distinct from equal text."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from datamodules.token_bins import bin_facts
from gpt2lab.data.tokenizer import (
    TextEncoder,
    encode_texts,
    load_tokenizer,
    make_numbered_tokenizer,
    prepare_tokenizer,
    tokenizer_hash,
    train_bpe,
)
from gpt2lab.errors import InputError
from gpt2lab.settings import TokenizerChoice
from tests.conftest import ROOT

TEXTS = [Path(os.__file__).with_name(name).read_text() for name in ("textwrap.py", "bisect.py", "heapq.py")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train_bpe(iter(TEXTS), 400).save_pretrained(tmp_path / "given")
    return tmp_path / "given"


def test_literal_end_of_text_is_not_a_special_token(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    (ids,) = TextEncoder(tokenizer)(["before<|endoftext|>after"])
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == "before<|endoftext|>after"


def test_hash_identifies_a_tokenizer_after_saving_and_padding(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(tokenizer) == before == tokenizer_hash(train_bpe(iter(TEXTS), 400))
    tokenizer.save_pretrained(tmp_path / "again")
    assert tokenizer_hash(load_tokenizer(str(tmp_path / "again"))) == before
    assert tokenizer_hash(train_bpe(iter(TEXTS), 401)) != before


def test_given_tokenizer_is_copied_into_the_cache(folder: Path, tmp_path: Path) -> None:
    choice = TokenizerChoice("pretrained", source=str(folder))
    copy = prepare_tokenizer(choice, "text", {}, lambda: iter(()), tmp_path / "cache")
    expected = tokenizer_hash(load_tokenizer(str(folder)))
    for file in folder.iterdir():
        file.unlink()
    assert tokenizer_hash(AutoTokenizer.from_pretrained(copy, local_files_only=True)) == expected


def test_transformers_alone_loads_a_trained_tokenizer_offline(tmp_path: Path) -> None:
    made = prepare_tokenizer(TokenizerChoice("bpe", 300), "text", {"a": 1}, lambda: iter(TEXTS), tmp_path)
    tokenizer, text = AutoTokenizer.from_pretrained(made, local_files_only=True), "def f():\n\treturn 1  # ä"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 300
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"


@pytest.mark.parametrize("source", ["/no/such/folder", "", "a/b/c"])
def test_a_path_that_leads_nowhere_is_refused_at_once(source: str) -> None:
    with pytest.raises(InputError, match="no such folder"):
        load_tokenizer(source)


def test_a_damaged_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{broken")
    with pytest.raises(InputError, match="Cannot load the tokenizer") as caught:
        load_tokenizer(str(folder))
    assert len(str(caught.value).splitlines()) <= 5


OFFLINE = """
import json, sys
from gpt2lab.errors import InputError
from gpt2lab.data.tokenizer import load_tokenizer
found = {"timeouts": [], "sleeps": 0}
def note(event, arguments):
    if event == "socket.connect":
        found["timeouts"].append(arguments[0].gettimeout())
    found["sleeps"] += event == "time.sleep"
sys.addaudithook(note)
try:
    load_tokenizer("example/tokenizer")
except InputError as error:
    print(json.dumps({**found, "lines": len(str(error).splitlines()), "error": str(error)}))
"""


def test_unreachable_hub_is_tried_once_for_five_seconds(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    environment = {name: value for name, value in environment.items() if "proxy" not in name.lower()}
    command = [sys.executable, "-c", OFFLINE]
    output = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True).stdout
    found = json.loads(output)
    assert found["timeouts"] == [5], "seconds for each attempt to connect"
    assert found["sleeps"] == 0, "no pauses between attempts"
    assert found["lines"] <= 5
    assert "cannot be reached" in found["error"]


def test_tokens_without_a_tokenizer_are_shown_as_numbers(tmp_path: Path) -> None:
    make_numbered_tokenizer(50_257).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert (len(tokenizer), tokenizer.eos_token_id) == (50_257, 50_256)
    assert tokenizer("<17> <4>")["input_ids"] == [17, 4]
    assert tokenizer.decode([17, 4]).split() == ["<17>", "<4>"]


BIN_OFFLINE = """
import sys
from pathlib import Path
from datamodules.token_bins import bin_facts
from gpt2lab.settings import TokenizerChoice
print(bin_facts(Path(sys.argv[1]), TokenizerChoice("pretrained", source="gpt2"), Path(sys.argv[2]))[1])
"""


@pytest.mark.slow
def test_nanogpt_files_need_no_hub(tmp_path: Path) -> None:
    for name in ("train.bin", "val.bin"):
        (np.arange(3000) % 50_257).astype("<u2").tofile(tmp_path / name)
    (tmp_path / "meta.pkl").write_bytes(b"never opened")
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    environment = {name: value for name, value in environment.items() if "proxy" not in name.lower()}
    command = [sys.executable, "-c", BIN_OFFLINE, str(tmp_path), str(tmp_path / "cache")]
    output = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    assert "'vocab_size': 50257" in output.stdout
    assert "'val_bytes': 0" in output.stdout
    assert "is unavailable" in output.stderr


def test_token_files_of_another_tokenizer_or_dtype_are_refused(folder: Path, tmp_path: Path) -> None:
    choice = TokenizerChoice("pretrained", source=str(folder))
    np.full(100, 400, dtype="<u2").tofile(tmp_path / "train.bin")
    np.zeros(100, dtype="<u2").tofile(tmp_path / "val.bin")
    with pytest.raises(InputError, match=r"train\.bin contains token 400"):
        bin_facts(tmp_path, choice, tmp_path / "cache")
    (tmp_path / "train.bin").write_bytes(b"odd")
    with pytest.raises(InputError, match="odd number of bytes"):
        bin_facts(tmp_path, choice, tmp_path / "cache")
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 100
    (tmp_path / "train.bin").write_bytes(header.tobytes() + np.zeros(100, "<u2").tobytes())
    with pytest.raises(InputError, match=r"train\.bin begins with the header of llm\.c(?s:.*)tail -c \+1025"):
        bin_facts(tmp_path, choice, tmp_path / "cache")


@pytest.mark.timeout(120, method="thread")  # instead of reading for an hour
def test_large_files_are_checked_by_samples(folder: Path, tmp_path: Path) -> None:
    with (tmp_path / "train.bin").open("wb") as file:
        file.truncate(2**41)  # sparse: takes no space on the disk
    np.zeros(100, dtype="<u2").tofile(tmp_path / "val.bin")
    facts = bin_facts(tmp_path, TokenizerChoice("pretrained", source=str(folder)), tmp_path / "cache")[1]
    assert facts["vocab_size"] == 400


# Tokenizers of a model folder with fewer embeddings than tokens


def with_pad(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})


def with_words(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_tokens(["<user>", "<model>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})


@pytest.mark.parametrize("add", [with_pad, with_words])
def test_added_tokens_without_an_embedding_are_left_out(
    add: Callable[[PreTrainedTokenizerFast], None], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = load_tokenizer(str(folder))
    (folder / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 400}')
    tokenizer = load_tokenizer(str(folder))
    add(tokenizer)
    names = set(tokenizer.get_vocab()) - set(before.get_vocab())
    tokenizer.save_pretrained(folder)
    loaded = load_tokenizer(str(folder))
    assert tokenizer_hash(loaded) == tokenizer_hash(before)
    assert loaded.pad_token == loaded.eos_token == "<|endoftext|>"
    assert loaded.all_special_tokens == ["<|endoftext|>"]
    assert all(name in caplog.text for name in names)
    assert encode_texts(["a [PAD] <user> b"], loaded) == encode_texts(["a [PAD] <user> b"], before)


def test_missing_embedding_of_a_needed_token_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 399}')
    with pytest.raises(InputError, match="has 400 tokens, but the model has 399 embeddings"):
        load_tokenizer(str(folder))
    (folder / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 400}')
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=r"no embedding for the eos_token '<\|im_end\|>'"):
        load_tokenizer(str(folder))


def test_endless_word_does_not_stall_tokenizer_training() -> None:
    """Training takes time quadratic in the length of a word: this one alone would take hours."""
    tokenizer = train_bpe(iter(["a" * 2_000_000 + " some words and some words more", "=" * 2_000_000]), 300)
    assert tokenizer.decode(tokenizer("aaaa some words")["input_ids"]) == "aaaa some words"
