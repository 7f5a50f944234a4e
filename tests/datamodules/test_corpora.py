"""Corpora become token files: every file format, the split, a cache written once and atomically, fixed windows."""

import gzip
import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from filelock import FileLock

from datamodules.documents import file_documents, find_files, stdlib_corpus
from datamodules.language_modeling import LanguageModelingData
from datamodules.micro_batches import SequentialBatches, TrainingStream
from datamodules.token_preparation import split_corpus
from gpt2lab.data.batch import IGNORE_INDEX
from gpt2lab.data.objectives import Objective
from gpt2lab.data.token_file import TokenFile
from gpt2lab.data.tokenizer import differing_tokens, load_tokenizer, train_bpe
from gpt2lab.data.windows import Windows
from gpt2lab.errors import InputError
from gpt2lab.settings import DataFacts, ObjectiveSettings, TokenizerChoice
from gpt2lab.storage.prepared_cache import get_or_build, read_ledger
from tests.conftest import ROOT

STORIES = [Path(os.__file__).with_name(name).read_text() for name in ("textwrap.py", "bisect.py", "heapq.py", "abc.py")]


def text_data(path: Path, cache: Path, **changes: object) -> LanguageModelingData:
    arguments: dict = {
        "name": "text",
        "source": "text",
        "path": str(path),
        "tokenizer": TokenizerChoice("bpe", 400),
        "context": 32,
        "batch_sequences": 8,
        "accumulate": 1,
        "seed": 1,
        "cache_dir": str(cache),
    }
    return LanguageModelingData(**{**arguments, **changes})


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    folder = tmp_path / "stories"
    folder.mkdir()
    for number, story in enumerate(STORIES):
        (folder / f"{number}.txt").write_text(story)
    return folder


# Reading


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    texts = ["first text\nwith two lines\n", "second: ä, 漢字\n"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    pq.write_table(pa.table({"text": texts}), tmp_path / "d.parquet")
    for file in find_files(str(tmp_path), "path"):
        assert [document.text for document in file_documents(file, "text", "stop")] == texts, file
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(texts[1].encode()))
    (tmp_path / "f.md").write_text(texts[1])
    for name in ("e.txt.gz", "f.md"):
        assert [document.text for document in file_documents(tmp_path / name, "text", "stop")] == texts[1:]


def test_files_folders_and_globs_name_the_same_files(stories: Path) -> None:
    (stories / "picture.png").write_bytes(b"\x89PNG")
    assert find_files(str(stories), "path") == find_files(f"{stories}/*.txt", "path") == sorted(stories.glob("*.txt"))


def test_one_long_file_is_enough_for_both_sides(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("".join(STORIES))
    facts = text_data(tmp_path / "all.txt", tmp_path / "cache").prepare()
    assert facts.train_tokens > 5 * facts.val_tokens > 0


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        ("", {}, "is empty"),
        ("tiny", {}, "one window"),
        ('{"text": "a"}\n{broken\n', {"suffix": ".jsonl"}, r"\.jsonl:2: invalid JSON"),
        ('{"body": "a"}\n', {"suffix": ".jsonl"}, "no column 'text'"),
        ("PAR1", {"suffix": ".parquet"}, "not a readable parquet"),
    ],
)
def test_unusable_text_is_refused_with_a_fix(tmp_path: Path, content: str, changes: dict, message: str) -> None:
    file = tmp_path / f"data{changes.get('suffix', '.txt')}"
    file.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        text_data(file, tmp_path / "cache").prepare()
    assert len(str(caught.value).splitlines()) <= 5


def test_too_little_text_for_one_window_is_refused(stories: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one window of context=100000"):
        text_data(stories, tmp_path / "cache", context=100_000).prepare()


def test_broken_lines_can_be_left_out(tmp_path: Path) -> None:
    lines = [json.dumps({"text": story}) for story in STORIES]
    (tmp_path / "data.jsonl").write_text("\n".join([lines[0], "{broken", *lines[1:]]))
    facts = text_data(tmp_path / "data.jsonl", tmp_path / "cache", on_bad_line="skip").prepare()
    assert facts.train_tokens > 0


# Splitting


def test_split_has_every_document_once_for_any_fraction() -> None:
    corpus = stdlib_corpus()
    everything = sorted(document.path for document in corpus.documents())
    for fraction in (1e-9, 0.05, 1 - 1e-9):
        placed = [(side, document.path) for side, document in split_corpus(corpus, fraction)()]
        assert sorted(path for _, path in placed) == everything
        assert {side for side, _ in placed} == {"train", "val"}


def test_the_standard_library_comes_without_its_tests() -> None:
    paths = [document.path for document in stdlib_corpus().documents()]
    assert "textwrap.py" in paths
    assert not any(path.startswith("test/") or "/tests/" in path for path in paths)


# Tokens and windows


def test_token_file_decodes_to_the_text_and_counts_its_bytes(stories: Path, tmp_path: Path) -> None:
    data = text_data(stories, tmp_path / "cache", val_path=str(stories / "3.txt"))
    facts = data.prepare()
    tokenizer = load_tokenizer(facts.tokenizer_folder)
    documents = tokenizer.decode(data.val_samples.file.tokens.tolist()).split("<|endoftext|>")
    assert "".join(documents) == STORIES[3]
    assert facts.val_bytes == len(STORIES[3].encode())
    assert facts.val_tokens == len(data.val_samples.file.tokens) - 1


def test_windows_tile_the_file_and_labels_are_the_next_token(tmp_path: Path) -> None:
    np.arange(100, dtype="<u2").tofile(tmp_path / "t.bin")
    file = TokenFile(tmp_path / "t.bin", np.dtype("<u2"), context=8, keep_short=True)
    ids, labels = file.read(np.arange(file.windows))
    assert ids[0].tolist() == list(range(8))
    assert labels[0].tolist() == list(range(1, 9))
    assert ids[5, 0] == 40
    assert labels[labels != IGNORE_INDEX].tolist() == list(range(1, 100))
    assert file.target_counts(np.arange(file.windows)).sum() == file.targets == 99
    assert TokenFile(tmp_path / "t.bin", np.dtype("<u2"), context=8).windows == 12


def test_validation_covers_every_target_once_over_ranks(tmp_path: Path) -> None:
    np.arange(1000, dtype="<u2").tofile(tmp_path / "t.bin")
    file = TokenFile(tmp_path / "t.bin", np.dtype("<u2"), context=8, keep_short=True)
    for world in (1, 2, 3):
        by_rank = [list(SequentialBatches(file, 4, rank, world)) for rank in range(world)]
        assert len(set(map(len, by_rank))) == 1, "sharded ranks run forward together"
        batches = [batch for rank in by_rank for batch in rank]
        assert sum(batch.target_tokens for batch in batches) == 999
        assert sorted(torch.cat([batch.indices for batch in batches]).tolist()) == list(range(file.windows))


def test_training_resumes_at_any_step_with_the_same_batches(tmp_path: Path) -> None:
    np.arange(1000, dtype="<u2").tofile(tmp_path / "t.bin")
    file = Windows(TokenFile(tmp_path / "t.bin", np.dtype("<u2"), context=8), Objective(ObjectiveSettings()))
    whole = TrainingStream(file, 12, 3, seed=5, rank=1, world=2, first_step=0)
    later = TrainingStream(file, 12, 3, seed=5, rank=1, world=2, first_step=20)
    for number in range(9):
        assert torch.equal(whole[60 + number].input_ids, later[number].input_ids)
        assert later[number].target_tokens == 12 * 8


def test_the_loader_gives_batches_with_worker_processes_too(stories: Path, tmp_path: Path) -> None:
    batches = []
    for workers in (0, 2):
        data = text_data(stories, tmp_path / "cache", workers=workers)
        data.prepare()
        batches.append([batch.input_ids for batch in islice(data.train_dataloader(), 5)])
    assert all(torch.equal(one, two) for one, two in zip(*batches, strict=True))


# Cache


def test_second_prepare_reuses_the_cache_unless_options_change(stories: Path, tmp_path: Path) -> None:
    first = text_data(stories, tmp_path / "cache").prepare()
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.bin")}
    assert text_data(stories, tmp_path / "cache").prepare() == first
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.bin")} == stamps
    assert text_data(stories, tmp_path / "cache", val_fraction=0.5).prepare().hash != first.hash
    (stories / "0.txt").write_text(STORIES[0] + "more\n")
    assert text_data(stories, tmp_path / "cache").prepare().hash != first.hash


# Builds until it reads a line.
BUILD = """
import sys
from pathlib import Path
from gpt2lab.storage.prepared_cache import get_or_build
def build(folder):
    (folder / "part").write_text("half")
    print("building", flush=True)
    sys.stdin.readline()
    (folder / "part").write_text("whole")
    return {}
print(get_or_build("kind", "name", {"a": 1}, build, Path(sys.argv[1])), flush=True)
"""


def start_build(cache: Path, stdin: int = subprocess.PIPE) -> subprocess.Popen:
    command, pipe = [sys.executable, "-c", BUILD, str(cache)], subprocess.PIPE
    return subprocess.Popen(command, stdin=stdin, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


def test_a_killed_preparation_is_never_used(tmp_path: Path) -> None:
    killed = start_build(tmp_path)
    assert killed.stdout.readline() == "building\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    folder = get_or_build("kind", "name", {"a": 1}, lambda folder: {"files": sorted(folder.iterdir()) == []}, tmp_path)
    assert read_ledger(folder)["files"] is True


def test_concurrent_processes_build_the_cache_once(tmp_path: Path) -> None:
    """The second process waits while the first one builds."""
    first = start_build(tmp_path)
    assert first.stdout.readline() == "building\n"
    second = start_build(tmp_path, subprocess.DEVNULL)
    assert "waiting for another process" in second.stderr.readline()
    outputs = [first.communicate("go on\n")[0], second.communicate()[0]]
    assert outputs[0] == outputs[1]
    assert (Path(outputs[0].strip()) / "part").read_text() == "whole"


def test_a_full_disk_is_an_input_error_and_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> dict:
        (folder / "part").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left"):
        get_or_build("kind", "name", {"a": 1}, build, tmp_path)
    assert not [entry for entry in (tmp_path / "kind").iterdir() if entry.is_dir()]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    program = (
        "import sys, torch; sys.path.insert(0, '.')\n"
        "from pathlib import Path; from tests.datamodules.test_corpora import text_data\n"
        "from gpt2lab.system.device import peak_memory_bytes\n"
        "text_data(Path(sys.argv[1]), Path(sys.argv[2])).prepare();"
        "print(peak_memory_bytes(torch.device('cpu')) // 2**20)"  # getrusage would count this process too
    )
    peaks = []
    for copies in (300, 2000):  # with the fewer, all buffers are full already
        file = tmp_path / f"{copies}.txt"
        file.write_text("".join(STORIES) * copies)
        command = [sys.executable, "-c", program, str(file), str(tmp_path / "cache")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        output = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
        peaks.append(int(output.stdout.split()[-1]))
    grown = (tmp_path / "2000.txt").stat().st_size / 2**20
    assert grown > 90
    assert peaks[1] - peaks[0] < 40


# Tokenizers


def test_trained_tokenizer_round_trips_any_text(tmp_path: Path) -> None:
    tokenizer = train_bpe(iter(STORIES), 400)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    text = "def f(x):\n\treturn 'ä漢🙂'  # \x00 end "
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert len(loaded) == 400
    assert loaded.eos_token == "<|endoftext|>"
    assert differing_tokens(tokenizer, loaded) == ""
    assert "'" in differing_tokens(train_bpe(iter(STORIES[:1]), 300), loaded)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(InputError, match="contains no tokenizer"):
        load_tokenizer(str(tmp_path))


# Other sources


@pytest.mark.parametrize("streaming", [False, True])
def test_local_data_set_is_read_like_a_hub_one(tmp_path: Path, streaming: bool) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in STORIES[:3]))
    (folder / "validation.jsonl").write_text(json.dumps({"text": STORIES[3]}) + "\n")
    hub = {"source": "hub", "dataset": str(folder), "val_split": "validation", "streaming": streaming}
    facts = text_data(folder, tmp_path / "cache", **hub).prepare()
    assert facts.val_bytes == len(STORIES[3].encode())
    with pytest.raises(InputError, match="no column 'body'"):
        text_data(folder, tmp_path / "cache", **hub, text_column="body").prepare()


def test_local_data_set_hash_includes_file_names(tmp_path: Path) -> None:
    """`datasets` derives the splits from the file names: other names for the same files are other data."""
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in STORIES[:2]))
    (folder / "test.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in STORIES[2:]))
    first = text_data(folder, tmp_path / "cache", source="hub", dataset=str(folder)).prepare()
    (folder / "train.jsonl").rename(folder / "validation.jsonl")
    (folder / "test.jsonl").rename(folder / "train.jsonl")
    second = text_data(folder, tmp_path / "cache", source="hub", dataset=str(folder)).prepare()
    assert first.hash != second.hash


def test_files_held_out_for_validation_are_never_trained_on(stories: Path, tmp_path: Path) -> None:
    whole = text_data(stories, tmp_path / "cache", val_path=str(stories / "3.txt")).prepare()
    (stories / "3.txt").rename(tmp_path / "3.txt")
    apart = text_data(stories, tmp_path / "cache", val_path=str(tmp_path / "3.txt")).prepare()
    assert (whole.train_tokens, whole.val_tokens) == (apart.train_tokens, apart.val_tokens)
    with pytest.raises(InputError, match="no other file"):
        text_data(tmp_path / "3.txt", tmp_path / "cache", val_path=str(tmp_path / "3.txt")).prepare()


def test_a_saved_data_set_is_read_and_a_missing_one_refused(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": STORIES})
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "saved")
    facts = text_data(tmp_path, tmp_path / "cache", source="hub", dataset=str(tmp_path / "saved")).prepare()
    assert facts.train_tokens > facts.val_tokens > 0
    with pytest.raises(InputError, match="Cannot load the data set"):
        text_data(tmp_path, tmp_path / "cache", source="hub", dataset=str(tmp_path / "nothing")).prepare()


def test_nanogpt_files_are_used_in_place(stories: Path, tmp_path: Path) -> None:
    made = text_data(stories, tmp_path / "cache")
    facts = made.prepare()
    folder = tmp_path / "bin"
    folder.mkdir()
    made.train_samples.file.tokens.tofile(folder / "train.bin")
    made.val_samples.file.tokens.tofile(folder / "val.bin")
    tokenizer = TokenizerChoice("pretrained", source=facts.tokenizer_folder)
    data = text_data(folder, tmp_path / "other", source="bin", name="bin", tokenizer=tokenizer)
    read: DataFacts = data.prepare()
    assert (read.train_tokens, read.val_tokens) == (facts.train_tokens, facts.val_tokens)
    spelt = load_tokenizer(facts.tokenizer_folder).decode(
        made.val_samples.file.tokens[1:].tolist(), skip_special_tokens=True
    )
    assert read.val_bytes == len(spelt.encode())
    assert not (tmp_path / "other" / "tokens").exists()
    (folder / "val.bin").unlink()
    with pytest.raises(InputError, match=r"val\.bin not found"):
        data.prepare()


@pytest.mark.timeout(120)  # instead of a wait without end
def test_prepared_data_are_used_while_locked_by_others(stories: Path, tmp_path: Path) -> None:
    first = text_data(stories, tmp_path / "cache").prepare()
    folders = [folder for folder in (tmp_path / "cache").glob("*/*") if folder.is_dir()]
    assert {folder.parent.name for folder in folders} == {"tokenizers", "tokens"}
    with ExitStack() as held:
        for folder in folders:
            held.enter_context(FileLock(f"{folder}.lock"))
        assert text_data(stories, tmp_path / "cache").prepare() == first
