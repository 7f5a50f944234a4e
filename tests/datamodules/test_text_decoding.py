"""Every reader detects the encoding of its files: their mark, UTF-16, UTF-8, else Latin-1; binary data are refused."""

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from datamodules.catalogue_pairs import catalogue_rows
from datamodules.documents import file_documents, stdlib_corpus
from datamodules.pair_sources import open_pair_source, open_tables
from gpt2lab.errors import InputError
from gpt2lab.storage.damaged_files import warn_once

GERMAN = "Die Brücke über die Isar.\nGrüße aus München, „schön“ – 20 €.\n"
WESTERN = "Die Brücke über die Isar.\r\nGrüße aus Köln\n"
CHINESE = "河上有一座桥。\n他们在桥上等了一个小时，然后回家了。\n" * 9
RUSSIAN = "Окно в доме у реки.\nЛампа стоит на камне.\n"
KOREAN = "강가의 집에 창문이 있다.\n다리 위에서 한 시간을 기다렸다.\n"
QUOTED = "「你好」、「再見」。"
EMOJI = "😀😁🎉"
WIDE = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
ENCODED = [
    *(
        (GERMAN, encoding)
        for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252")
    ),
    *((text, encoding) for text in (GERMAN, CHINESE, RUSSIAN, KOREAN, QUOTED, EMOJI) for encoding in ("utf-8", *WIDE)),
    (WESTERN, "latin-1"),
]


def read_text(file: Path) -> str:
    return "".join(document.text for document in file_documents(file, "text", "stop"))


def read_tables(file: Path) -> str:
    (row,) = open_tables(str(file), "path", "stop", ("text", "more")).rows()
    return row["text"]


def read_functions(file: Path) -> str:
    (row,) = open_pair_source("functions", str(file), "", "stop", ("code", "docstring")).rows()
    return row["docstring"]


def jsonl(text: str) -> str:
    return json.dumps({"text": text}, ensure_ascii=False) + "\n"


def same(text: str) -> str:
    return text


# Ending → (text as the content of such a file, its reader)
READERS: dict[str, tuple[Callable[[str], str], Callable[[Path], str]]] = {
    ".txt": (same, read_text),
    ".md.gz": (same, read_text),
    ".rst.zst": (same, read_text),
    ".jsonl": (jsonl, read_text),
    ".jsonl.gz": (jsonl, read_tables),
    ".csv": (lambda text: f'text,more\n"{text}",1\n', read_tables),
    ".tsv": (lambda text: "text\tmore\n" + text.replace("\r\n", " ").replace("\n", " ").strip() + "\t1\n", read_tables),
    ".py": (lambda text: f'def f(a):\n    """{text}"""\n    return a\n', read_functions),
}


def write(file: Path, data: bytes) -> Path:
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}
    file.write_bytes(packed[file.suffix](data) if file.suffix in packed else data)
    return file


@pytest.mark.parametrize("ending", READERS)
def test_text_is_read_in_any_encoding_by_every_reader(tmp_path, ending):
    wrap, read = READERS[ending]
    wrong = []
    for number, (text, encoding) in enumerate(ENCODED):
        found = read(write(tmp_path / f"{number}{ending}", wrap(text).encode(encoding)))
        if found.split() != text.split():
            wrong.append((encoding, found[:20]))
    assert wrong == []


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".csv", ".tsv", ".py"])
def test_latin1_is_read_with_one_notice_per_file(tmp_path, caplog, ending):
    wrap, read = READERS[ending]
    files = [write(tmp_path / f"{name}{ending}", wrap(WESTERN).encode("latin-1")) for name in "ab"]
    for file in files * 3:
        assert read(file).split() == WESTERN.split()
    notices = [record.getMessage() for record in caplog.records]
    warn_once.cache_clear()  # as at the start of the next command
    assert read(files[0])
    assert len(caplog.records) == len(files) + 1
    assert sorted(notice.partition(":")[0] for notice in notices) == [str(file) for file in files]
    assert all("Latin-1" in notice and "iconv -f" in notice for notice in notices)


def test_latin1_lines_do_not_damage_utf8_in_the_same_file(tmp_path, caplog):
    file = write(tmp_path / "a.txt", GERMAN.encode() + WESTERN.encode("latin-1"))
    assert read_text(file) == GERMAN + WESTERN
    assert "first in line 3 (" in caplog.text


def test_python_source_is_read_in_its_declared_encoding(tmp_path, caplog):
    source = f'# -*- coding: koi8-r -*-\ndef f(a):\n    """{RUSSIAN}"""\n    return a\n'
    assert read_functions(write(tmp_path / "a.py", source.encode("koi8-r"))).split() == RUSSIAN.split()
    assert not caplog.text


def test_installed_source_that_is_no_text_is_left_out(tmp_path, caplog, monkeypatch):
    (tmp_path / "text.py").write_bytes('a = "é"\n'.encode("latin-1"))
    (tmp_path / "binary.py").write_bytes(b"def f(a):\n    return a\n\0\0")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    assert [document.text for document in stdlib_corpus().documents()] == ['a = "é"\n']
    assert "binary.py:3: binary data, not text" in caplog.text


def test_catalogue_without_charset_is_decoded_too(tmp_path):
    (tmp_path / "de.po").write_text('msgid "Open file"\nmsgstr "Datei öffnen\u2028Jetzt"\n', encoding="utf-16")
    rows = list(catalogue_rows([tmp_path / "de.po"]))
    assert rows == [{"source": "Open file", "target": "Datei öffnen\u2028Jetzt", "file": str(tmp_path / "de.po")}]


BINARY = [
    ("stray NUL", b"The lamp\ncounts\0the stone\n", 2),
    ("NUL between words", b"name\0value\0" * 99, 1),
    ("NUL in Russian UTF-8", f"{RUSSIAN}\0{RUSSIAN}".encode(), 3),
    ("token ids of 32 bits", b"".join(number.to_bytes(4, "little") for number in range(0, 50000, 7)), 0),
    ("program", Path(sys.executable).resolve().read_bytes()[: 2**16], 0),
    ("compressed", gzip.compress(CHINESE.encode() * 3), 0),
    ("parquet", b"", 0),
    ("UTF-16 that ends early", GERMAN.encode("utf-16")[:-1], 2),
    ("half a UTF-16 pair", GERMAN.encode("utf-16").replace("20".encode("utf-16-le"), b"2\0\0\xd8"), 2),
    ("control bytes", bytes(range(1, 256)) * 9, 0),
]


@pytest.mark.parametrize(("name", "data", "line"), BINARY)
@pytest.mark.parametrize("ending", [".txt", ".md.gz", ".py", ".csv", ".jsonl"])
def test_binary_data_are_refused_with_file_and_line(tmp_path, name, data, line, ending):
    if name == "parquet":
        pq.write_table(pa.table({"text": [CHINESE]}), tmp_path / "table")
        data = (tmp_path / "table").read_bytes()
    file = write(tmp_path / f"a{ending}", data)
    with pytest.raises(InputError) as caught:
        READERS[ending][1](file)
    message = str(caught.value)
    assert message.startswith(f"{file}:{line}:" if line and ending in (".txt", ".md.gz", ".py") else f"{file}")
    assert "binary data" in message or "damaged text" in message or ending in (".csv", ".jsonl")
    assert 2 <= len(message.splitlines()) <= 3
