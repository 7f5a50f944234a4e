"""Documents keep their text: long files in pieces, splits that depend on the text alone, damaged and hidden files."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from datamodules.documents import (
    PIECE_CHARACTERS,
    Corpus,
    file_documents,
    file_records,
    files_identity,
    find_files,
    packages_corpus,
    stdlib_corpus,
    text_corpus,
)
from datamodules.language_modeling import LanguageModelingData
from datamodules.token_preparation import split_corpus
from gpt2lab.data.tokenizer import load_tokenizer
from gpt2lab.errors import InputError
from gpt2lab.settings import TokenizerChoice
from gpt2lab.storage.prepared_cache import read_ledger
from launch.checks.checks import check_files
from tests.support.configurations import composed

MODULES = ("argparse.py", "ast.py", "bisect.py", "calendar.py", "cgi.py", "cmd.py", "code.py", "codecs.py", "copy.py")
SOURCES = [path.read_text() for name in MODULES if (path := Path(os.__file__).with_name(name)).is_file()]


def text_data(path: Path, cache: Path, **changes: object) -> LanguageModelingData:
    arguments: dict = {
        "name": "text",
        "source": "text",
        "path": str(path),
        "tokenizer": TokenizerChoice("bpe", 500),
        "context": 32,
        "batch_sequences": 8,
        "accumulate": 1,
        "seed": 1,
        "cache_dir": str(cache),
    }
    return LanguageModelingData(**{**arguments, **changes})


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_long_file_in_pieces_has_the_same_text_and_tokens(tmp_path: Path, line_end: str) -> None:
    text = (line_end.join(SOURCES) + " \t\n\n").replace("\r\r", "\r")
    assert len(text) > 3 * PIECE_CHARACTERS
    with (tmp_path / "long.txt").open("w", newline="") as file:
        file.write(text)
    pieces = list(file_documents(tmp_path / "long.txt", "text", "stop"))
    assert len(pieces) > 3
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.continues for piece in pieces] == [False] + [True] * (len(pieces) - 1)
    assert len({piece.key for piece in pieces}) == 1
    facts = text_data(tmp_path / "long.txt", tmp_path / "cache").prepare()
    tokenizer = load_tokenizer(facts.tokenizer_folder)
    in_pieces = [token for piece in pieces for token in tokenizer(piece.text)["input_ids"]]
    assert in_pieces == tokenizer(text)["input_ids"]


def test_a_text_without_line_ends_is_read_whole(tmp_path: Path) -> None:
    text = "word " * 500_000
    (tmp_path / "long.txt").write_text(text)
    pieces = list(file_documents(tmp_path / "long.txt", "text", "stop"))
    assert "".join(piece.text for piece in pieces) == text
    assert len(pieces) > 1


def test_each_file_is_one_document_after_an_end_of_text(tmp_path: Path) -> None:
    for number, source in enumerate(SOURCES):
        (tmp_path / f"{number}.txt").write_text(source)
    data = text_data(tmp_path, tmp_path / "cache")
    facts = data.prepare()
    ledger = read_ledger(data.val_samples.file.tokens.filename.parent)
    sides = ledger["sides"]
    assert sides["train"]["documents"] + sides["val"]["documents"] == len(SOURCES)
    assert sides["train"]["bytes"] + sides["val"]["bytes"] == sum(len(source.encode()) for source in SOURCES)
    tokenizer = load_tokenizer(facts.tokenizer_folder)
    both = [tokenizer.decode(side.file.tokens.tolist()) for side in (data.train_samples, data.val_samples)]
    assert all(text.startswith("<|endoftext|>") for text in both)
    assert sorted(document for text in both for document in text.split("<|endoftext|>")[1:]) == sorted(SOURCES)


def test_single_document_is_split_at_its_end_for_validation(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(text := "".join(SOURCES[:2]))
    data = text_data(tmp_path / "one.txt", tmp_path / "cache", val_fraction=0.1)
    tokenizer = load_tokenizer(data.prepare().tokenizer_folder)
    train, val = (tokenizer.decode(side.file.tokens[1:].tolist()) for side in (data.train_samples, data.val_samples))
    assert train + val == text
    assert train.endswith("\n")
    assert 0.09 < len(val) / len(text) < 0.11


def test_split_is_equal_in_every_file_format(tmp_path: Path) -> None:
    rows = [{"text": source} for source in SOURCES]
    kinds = ("txt", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "parquet.gz", "parquet.zst")
    for kind in kinds:
        (tmp_path / kind).mkdir()
    for number, source in enumerate(SOURCES):
        (tmp_path / "txt" / f"{number}.txt").write_text(source)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "jsonl" / "a.jsonl").write_bytes(lines)
    (tmp_path / "jsonl.gz" / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "jsonl.zst" / "a.jsonl.zst").write_bytes(
        zstandard.compress(lines[:999]) + zstandard.compress(lines[999:])
    )
    pq.write_table(pa.table({"text": SOURCES}), tmp_path / "parquet" / "a.parquet")
    table = (tmp_path / "parquet" / "a.parquet").read_bytes()
    (tmp_path / "parquet.gz" / "a.parquet.gz").write_bytes(gzip.compress(table))
    (tmp_path / "parquet.zst" / "a.parquet.zst").write_bytes(zstandard.compress(table))
    prepared = {
        (facts.hash, facts.val_bytes, facts.train_tokens)
        for kind in kinds
        for facts in [text_data(tmp_path / kind, tmp_path / "cache", val_fraction=0.3).prepare()]
    }
    assert len(prepared) == 1


def text_folder(folder: Path) -> Corpus:
    return text_corpus(str(folder), "", "text", "stop")


@pytest.mark.parametrize("open_corpus", [text_folder, lambda _: stdlib_corpus(), lambda _: packages_corpus()])
def test_equal_texts_are_on_the_same_side_of_the_split(tmp_path: Path, monkeypatch, open_corpus) -> None:
    for copy in ("a", "b", "c"):
        for number, source in enumerate(SOURCES):
            file = tmp_path / copy / f"{number}.py"
            file.parent.mkdir(exist_ok=True)
            file.write_text(source)
    monkeypatch.setattr("sysconfig.get_paths", lambda: dict.fromkeys(("stdlib", "purelib"), str(tmp_path)))
    sides: dict[str, set[str]] = {}
    for side, document in split_corpus(open_corpus(tmp_path), 0.4)():
        sides.setdefault(document.text, set()).add(side)
    assert set.union(*sides.values()) == {"train", "val"}
    assert all(len(found) == 1 for found in sides.values())


def test_moved_folder_keeps_its_hash(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        for number, source in enumerate(SOURCES):
            (tmp_path / name / f"{number}.txt").write_text(source)
    here, there = (files_identity(find_files(str(tmp_path / name), "path")) for name in ("here", "there"))
    assert here == there
    (tmp_path / "there" / "0.txt").write_text("other")
    assert files_identity(find_files(str(tmp_path / "there"), "path")) != here


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_compressed_file_that_ends_early_is_refused(tmp_path: Path, ending: str) -> None:
    whole = "".join(json.dumps({"text": source}) + "\n" for source in SOURCES).encode()
    packed = gzip.compress(whole) if ending == ".gz" else zstandard.compress(whole)
    (tmp_path / f"a.jsonl{ending}").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InputError, match=rf"Cannot read .*a\.jsonl{ending}"):
        list(file_records(tmp_path / f"a.jsonl{ending}", "skip"))


def test_invalid_utf8_and_byte_order_marks_are_handled(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbftext\r\n")
    assert [doc.text for doc in file_documents(tmp_path / "latin.txt", "text", "stop")] == ["café\n"]
    assert [doc.text for doc in file_documents(tmp_path / "marked.txt", "text", "stop")] == ["text\r\n"]


def test_hidden_folders_broken_links_and_other_files_are_skipped(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "note.txt").write_text("hidden")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "note.txt").write_text("seen")
    assert find_files(str(tmp_path), "path") == [tmp_path / "note.txt"]


# path= below a folder → files found; "a[1]" and "[ab]" are folders and files that exist
LITERAL = [
    ("a[1].txt", ["a[1].txt"]),
    ("a[12].txt", ["a1.txt"]),
    ("[ab]", ["[ab]/x.txt", "[ab]/y[1].txt"]),
    ("[ab]/*.txt", ["[ab]/x.txt", "[ab]/y[1].txt"]),
    ("[ab]/y[1].txt", ["[ab]/y[1].txt"]),
    ("[ab]/[xy]*", ["[ab]/x.txt", "[ab]/y[1].txt"]),
    ("[a]*.txt", ["a1.txt", "a[1].txt"]),
    ("**/y*.txt", ["[ab]/y[1].txt"]),
    ("what?/*", ["what?/z.txt"]),
]


@pytest.mark.parametrize(("pattern", "expected"), LITERAL)
@pytest.mark.parametrize("base", ["", "in[0]"])
def test_paths_that_exist_are_literal(
    tmp_path: Path, monkeypatch, base: str, pattern: str, expected: list[str]
) -> None:
    for name in ("a1.txt", "a[1].txt", "[ab]/x.txt", "[ab]/y[1].txt", "what?/z.txt", "c.png"):
        (tmp_path / base / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / base / name).write_text(name)
    monkeypatch.chdir(tmp_path / base)
    assert [str(file) for file in find_files(pattern, "path")] == expected
    assert find_files(f"{tmp_path / base}/{pattern}", "path") == [tmp_path / base / name for name in expected]
    check_files(composed("data=text", f"path={pattern}", f"val_path={tmp_path / base}/{pattern}"))


@pytest.mark.slow
def test_the_installed_packages_are_a_corpus() -> None:
    corpus = packages_corpus()
    assert corpus.size > 50 * 2**20
    assert any(document.path.startswith("datasets/") for document in corpus.documents())
