"""Records: values become text or are refused; a fault ends the run with its line, or is skipped and counted."""

import csv
import datetime
import gzip
import json
import re
import tracemalloc
from decimal import Decimal
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.documents import file_documents
from datamodules.pair_sources import open_tables, pair_text
from gpt2lab.errors import InputError
from tests.datamodules.test_documents import text_data
from tests.datamodules.test_pair_sources import make, pairs_of, preset

ROWS = [(f"river number {number}", f"holds stone {number}") for number in range(12)]


def parquet(file: Path, columns: dict) -> Path:
    pq.write_table(pa.table(columns), file)
    return file


# Values

LINE = '{"a": 1e5, "b": 1.10, "c": -0, "d": true, "e": null, "f": 123456789012345678901, "g": "x", "h": NaN, "i": 0}'
AS_WRITTEN = {"a": "1e5", "b": "1.10", "c": "-0", "d": "true", "e": "", "f": "123456789012345678901", "g": "x"}
ARROW_VALUES = [
    (pa.array([b"caf\xc3\xa9"]), "café"),
    (pa.array(["caf\xe9".encode("utf-16")], pa.large_binary()), "café"),
    (pa.array([b"caf\xe9"], pa.binary(4)), "café"),
    (pa.array([0.1], pa.float32()), "0.1"),
    (pa.array([np.float16(0.1)], pa.float16()), "0.1"),
    (pa.array([0.1]), "0.1"),
    (pa.array([0]), "0"),
    (pa.array([False]), "false"),
    (pa.array([Decimal("1.10")]), "1.10"),
    (pa.array([datetime.date(2020, 1, 2)]), "2020-01-02"),
    (pa.array(["x"]).dictionary_encode(), "x"),
]


def test_numbers_and_booleans_of_json_are_text_as_written(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINE)
    (row,) = open_tables(str(tmp_path / "a.jsonl"), "path", "stop", ("a", "b")).rows()
    expected = {**AS_WRITTEN, "h": "NaN", "i": "0"}
    assert {column: pair_text(row, column) for column in row} == expected
    for column, text in expected.items():
        assert "".join(doc.text for doc in file_documents(tmp_path / "a.jsonl", column, "stop")) == text


@pytest.mark.parametrize(("column", "text"), ARROW_VALUES)
def test_values_of_parquet_are_text_without_python_notation(tmp_path, column, text):
    file = parquet(tmp_path / "a.parquet", {"text": column})
    assert [document.text for document in file_documents(file, "text", "stop")] == [text]
    (row,) = open_tables(str(file), "path", "stop", ("text", "text")).rows()
    assert pair_text(row, "text") == text


REFUSED = [
    (".jsonl", ["a", "list"], "is a list"),
    (".jsonl", [], "is a list"),
    (".jsonl", {"en": "an", "de": "object"}, "is an object"),
    (".jsonl", {}, "is an object"),
    (".parquet", ["a", "list"], "is a list"),
    (".parquet", {"en": "an", "de": "object"}, "is an object"),
]


@pytest.mark.parametrize(("ending", "value", "reason"), REFUSED)
def test_lists_and_objects_are_refused_with_line_and_key(tmp_path, ending, value, reason):
    file, row = tmp_path / f"a{ending}", {"source": "x", "target": value}
    if ending == ".jsonl":
        file.write_text(json.dumps(row))
    else:
        pq.write_table(pa.Table.from_pylist([row]), file)
    place = re.escape(f"{file}:1: ")
    with pytest.raises(InputError, match=rf"^{place}target=target {reason}.*\n.*source=NAME .* on_bad_line=skip$"):
        make(file, tmp_path / "cache").prepare()
    with pytest.raises(InputError, match=rf"^{place}'target' {reason}.*\n.*data.text_column=NAME"):
        text_data(file, tmp_path / "cache", text_column="target").prepare()


def test_fields_of_an_object_are_named_in_its_error(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"source": "x", "target": {"en": "an", "de": "object"}}')
    with pytest.raises(InputError, match=r"target=target is an object, not text; its fields are target.en, target.de"):
        make(tmp_path / "a.jsonl", tmp_path / "cache").prepare()


# Labels


@pytest.fixture
def labelled() -> datasets.Dataset:
    """A data set as on the Hub: labels are numbers with names, -1 where one is missing."""
    label = datasets.ClassLabel(names=["negative", "positive"])
    features = {"text": datasets.Value("string"), "label": label, "more": {"label": label}}
    rows = [
        {"text": text, "label": number % 2, "more": {"label": 1 - number % 2}} for number, (text, _) in enumerate(ROWS)
    ]
    rows.append({"text": "no label", "label": -1, "more": {"label": -1}})
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


README = """---
configs:
- config_name: default
  data_files: train.csv
dataset_info:
  features:
  - {name: text, dtype: string}
  - {name: label, dtype: {class_label: {names: {'0': negative, '1': positive}}}}
---
"""


def write_labelled(stored: str, labelled: datasets.Dataset, folder: Path) -> None:
    if stored == "save_to_disk":
        labelled.save_to_disk(str(folder))
    elif stored == "parquet":
        labelled.to_parquet(str(folder / "train.parquet"))
    else:
        (folder / "README.md").write_text(README.replace("csv", stored))
        flat = labelled.remove_columns("more").cast_column("label", datasets.Value("int64"))
        flat.to_csv(str(folder / "train.csv")) if stored == "csv" else flat.to_json(str(folder / f"train.{stored}"))


LABELLED = [
    ("path", "parquet", "label"),
    ("path", "parquet", "more.label"),
    *(("dataset", stored, "label") for stored in ("parquet", "save_to_disk", "csv", "jsonl", "json")),
    *(("dataset", stored, "more.label") for stored in ("parquet", "save_to_disk")),
]


@pytest.mark.parametrize(("key", "stored", "column"), LABELLED)
def test_class_labels_are_names(tmp_path, labelled, key, stored, column):
    folder = tmp_path / "set[1]"
    folder.mkdir()
    write_labelled(stored, labelled, folder)
    where = {key: str(folder / "train.parquet" if key == "path" else folder), "target": column}
    names = ["negative", "positive"] if column == "label" else ["positive", "negative"]
    pairs = pairs_of(preset("classify", tmp_path / "cache", where))
    assert pairs == sorted((text, names[number % 2]) for number, (text, _) in enumerate(ROWS))


@pytest.mark.parametrize("info", ["not JSON", "[]", '{"info": null}', '{"info": {"features": []}}'])
def test_metadata_of_other_programs_name_no_labels(tmp_path, info):
    table = pa.table({"source": [a for a, _ in ROWS], "target": [b for _, b in ROWS]})
    pq.write_table(table.replace_schema_metadata({"huggingface": info}), tmp_path / "a.parquet")
    assert pairs_of(make(tmp_path / "a.parquet", tmp_path / "cache")) == sorted(ROWS)


# Faults of single records

LONG = 250_000  # bytes of a record in these tests
NESTED = '{"source": "x", "target": ' + "[" * 200_000
FAULTS = [
    ("a.jsonl", '{"source": "a", "target"', "invalid JSON"),
    ("a.jsonl", '["c", "d"]', "not a JSON object"),
    ("a.jsonl", '{"source": "only"}', "no such column"),
    ("a.jsonl", NESTED, "nested too deeply"),
    ("a.jsonl", '{"source": "x", "target": ["y"]}', "is a list"),
    ("a.jsonl", '{"source": "x", "target": {"y": 1}}', "is an object"),
    ("a.jsonl", '{"source": "x", "target": "y", "target": "z"}', "more than once"),
    ("a.jsonl", '{"source": "x", "target": "' + "y" * LONG + '"}', "longer than"),
    ("a.jsonl", '{"source": "x", "target": "' + "字" * (LONG // 3) + '"}', "longer than"),
    ("a.jsonl", "\0" * 500, "invalid JSON"),
    ("a.jsonl", '{"source": "x", "target": "half \\ud83d pair"}', "invalid text"),
    ("a.jsonl.gz", '{"source": "a", "target"', "invalid JSON"),
    ("a.csv", "c", "1 fields, but the first line has 2"),
    ("a.csv", "c,d,e", "3 fields, but the first line has 2"),
    ("a.csv", 'c,"d', "quote"),
    ("a.csv", 'c,"d"e', "quote"),
    ("a.csv", 'c,"d\nd "e" d",e', "quote"),
    ("a.csv", 'c,"d\nd",e', "3 fields, but the first line has 2"),
    ("a.csv", "c,d\0", "NUL"),
    ("a.csv", "c," + "d" * LONG, "longer than"),
    ("a.csv", 'c,"' + ("d" * 999 + "\n") * 250 + '",', "quote"),
    ("a.tsv", "c", "1 fields, but the first line has 2"),
    ("a.tsv", "c\t" + "d" * LONG, "longer than"),
    ("a.parquet", b"\xff\xfe", "invalid UTF-8"),
    ("a.parquet", b"d" * (LONG + 1), "longer than"),
    ("binary.parquet", b"d\0\1\0\0" + bytes(range(9)) * 9, "binary data"),
]


def table_with(file: Path, record: str | bytes) -> int:
    """Write ROWS with a faulty record in the middle; return its line or row."""
    before, after = ROWS[:6], ROWS[6:]
    plain = Path(file.name.removesuffix(".gz")).suffix
    if plain == ".parquet":
        assert isinstance(record, bytes)
        texts = [*(target.encode() for _, target in before), record, *(target.encode() for _, target in after)]
        column = pa.array(texts) if file.name.startswith("binary") else pa.array(texts).view(pa.string())
        parquet(file, {"source": [*(row[0] for row in before), "x", *(row[0] for row in after)], "target": column})
        return 7
    assert isinstance(record, str)
    if plain == ".jsonl":
        lines = [json.dumps({"source": source, "target": target}) for source, target in ROWS]
    else:
        delimiter = "\t" if plain == ".tsv" else ","
        lines = [delimiter.join(row) for row in [("source", "target"), *ROWS]]
    place = len(lines) - 6
    text = "\n".join([*lines[:place], record, *lines[place:], ""]).encode()
    file.write_bytes(gzip.compress(text) if file.suffix == ".gz" else text)
    return place + 1


@pytest.fixture
def small_records(monkeypatch):
    monkeypatch.setattr("datamodules.records.RECORD_BYTES", LONG, raising=False)


@pytest.mark.usefixtures("small_records")
@pytest.mark.parametrize(("name", "record", "reason"), FAULTS)
def test_fault_of_a_record_ends_the_run_or_is_skipped(tmp_path, caplog, name, record, reason):
    file = tmp_path / name
    line = table_with(file, record)
    with pytest.raises(InputError) as caught:
        make(file, tmp_path / "cache").prepare()
    message = str(caught.value)
    assert message.startswith(f"{file}:{line}: ")
    assert reason in message
    assert message.endswith("on_bad_line=skip")
    assert 2 <= len(message.splitlines()) <= 3
    assert pairs_of(make(file, tmp_path / "cache", {"on_bad_line": "skip"})) == sorted(ROWS)
    (notice,) = [text.getMessage() for text in caplog.records if "skipped" in text.getMessage()]
    unit = "row" if "parquet" in name else "line"
    assert notice.startswith(f"{file}: skipped 1 invalid {unit}s: 1 × ")
    assert reason in notice
    assert notice.endswith(f"(first: {unit} {line})")


def test_faults_of_text_records_are_counted_by_reason_once(tmp_path, caplog):
    rows = [json.dumps({"text": target}) for _, target in ROWS]
    faults = ["{broken", '{"body": "x"}', NESTED, '{"text": ["x"]}', "{broken too"]
    (tmp_path / "a.jsonl").write_text("\n".join([*rows, *faults, *rows]))
    (tmp_path / "val.jsonl").write_text("\n".join([*rows, *faults[:1]]))
    paths = {"val_path": str(tmp_path / "val.jsonl"), "context": 4, "on_bad_line": "skip"}
    text_data(tmp_path / "a.jsonl", tmp_path / "cache", **paths).prepare()
    notices = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert [notice.partition(" invalid")[0] for notice in notices] == [
        f"{tmp_path / 'a.jsonl'}: skipped 5",
        f"{tmp_path / 'val.jsonl'}: skipped 1",
    ]
    assert "2 × invalid JSON (first: line 13), 1 × no column 'text' (first: line 14)" in notices[0]
    with pytest.raises(InputError, match=r"val\.jsonl:13: invalid JSON"):
        text_data(tmp_path / "val.jsonl", tmp_path / "cache").prepare()


DAMAGED = {
    "source target": pa.array([b"\xff\xfe"] * len(ROWS)).view(pa.string()),
    "rows": pa.array([b"\xff\xfe"] * len(ROWS)).view(pa.string()),
    "time zone": pa.array([0] * len(ROWS), pa.timestamp("s", tz="No/Where")),
    "date": pa.array([2**62] * len(ROWS), pa.timestamp("us")),
}


@pytest.mark.parametrize("columns", DAMAGED)
def test_column_that_is_not_used_may_be_damaged(tmp_path, columns):
    damaged = DAMAGED[columns]
    table = pa.table({"source": [a for a, _ in ROWS], "target": [b for _, b in ROWS], "more": damaged})
    pq.write_table(table.append_column("more", damaged) if columns == "rows" else table, tmp_path / "a.parquet")
    assert pairs_of(make(tmp_path / "a.parquet", tmp_path / "cache")) == sorted(ROWS)


CSV = 'text,more\na,"'
LONG_RECORDS = [(".jsonl", '{"text": "', ""), (".csv", CSV, ""), (".csv", CSV, "\n"), (".tsv", "text\tmore\na\t", "")]


@pytest.mark.parametrize(("ending", "start", "line_end"), LONG_RECORDS)
def test_memory_of_a_long_record_is_bounded(tmp_path, monkeypatch, ending, start, line_end):
    monkeypatch.setattr("datamodules.records.RECORD_BYTES", 2**20, raising=False)
    with (tmp_path / f"a{ending}").open("w") as file:
        file.write(start)
        if line_end:
            file.write("\n" * 2**18)
        else:
            file.writelines("river holds stone " * 2**13 for _ in range(256))  # 36 MB
    rows = open_tables(str(tmp_path / f"a{ending}"), "path", "skip", ("text", "more")).rows()
    tracemalloc.start()
    assert list(rows) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20


# Delimited files


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".parquet"])
def test_column_name_that_occurs_twice_is_refused_if_used(tmp_path, kind):
    file = tmp_path / f"a{kind}"
    if kind == ".parquet":
        pq.write_table(pa.table([[row[0] for row in ROWS]] * 3, names=["source", "target", "target"]), file)
    else:
        delimiter = "\t" if kind == ".tsv" else ","
        lines = [("source", "target", "target"), *((*row, "0") for row in ROWS)]
        file.write_text("\n".join(map(delimiter.join, lines)))
    place = str(file) if kind == ".parquet" else f"{file}:1"
    for on_bad_line in ("stop", "skip"):
        with pytest.raises(InputError, match=rf"^{re.escape(place)}: 2 columns have the name 'target'.\n"):
            make(file, tmp_path / "cache", {"on_bad_line": on_bad_line}).prepare()
    pairs = pairs_of(make(file, tmp_path / "cache", {"target": "source"}))
    assert pairs == sorted((source, source) for source, _ in ROWS)


def test_unclosed_quote_names_its_line_and_loses_one_row(tmp_path):
    lines = [f"{source},{target}" for source, target in ROWS]
    lines[4] = lines[4].replace(",", ',"')
    for after in ("", '\nx,"y"', '\nx,"y, ""z"""\n'):
        file = tmp_path / f"{len(after)}.csv"
        file.write_text("\n".join(["source,target", *lines]) + after)
        with pytest.raises(InputError, match=rf"^{re.escape(str(file))}:6: .*quote"):
            make(file, tmp_path / "cache").prepare()
        rows = list(open_tables(str(file), "path", "skip", ("source", "target")).rows())
        assert len(rows) == len(ROWS) - 1 + bool(after)


HEADERS = [
    (".csv", 'source,"target\na,b\n', r"an unclosed.* quote.*\n.*this is the header"),
    (".csv", "source,target\0\na,b\n", r"a NUL byte.*\n.*this is the header"),
    (".csv", "source;target\na,1;b\n", r"'source;target' is separated by ';', not by ','.\n"),
    (".csv", "source\ttarget\na\tb\n", r"is separated by '\\t', not by ','.\n"),
    (".tsv", "source,target\na,b\n", r"is separated by ',', not by '\\t'.\n"),
]


@pytest.mark.parametrize(("ending", "text", "reason"), HEADERS)
def test_header_that_names_no_columns_is_refused(tmp_path, ending, text, reason):
    (tmp_path / f"a{ending}").write_text(text)
    for on_bad_line in ("stop", "skip"):
        with pytest.raises(InputError, match=rf"a{ending}:1: .*{reason}"):
            make(tmp_path / f"a{ending}", tmp_path / "cache", {"on_bad_line": on_bad_line}).prepare()


def test_quoted_fields_are_read_as_spreadsheets_write_them(tmp_path):
    rows = [
        ["source", "target"],
        *map(list, ROWS),
        ['a "quoted" text', "lines\nand, commas\r\n"],
        ['5" pipe', "\f\u2028"],
    ]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    read = [list(row.values()) for row in open_tables(str(tmp_path / "a.csv"), "path", "stop", ("a", "b")).rows()]
    assert read == rows[1:]


# Data sets in a local folder


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.parquet", "a.txt", "utf16.txt"])
def test_local_data_set_has_the_reader_of_path(tmp_path, name):
    """`datasets` itself guesses types, such as dates, and takes "None" for a missing value."""
    folder = tmp_path / "set [1]"
    folder.mkdir()
    texts = ["2020-01-01", "None", "1.10", *(target for _, target in ROWS)]
    if name.endswith("parquet"):
        parquet(folder / name, {"text": texts, "more": texts})
    elif name.endswith("jsonl"):
        (folder / name).write_text("\n".join(json.dumps({"text": text, "more": 1}) for text in texts))
    elif name.endswith("txt"):
        (folder / name).write_text("\n".join(texts), encoding="utf-16" if name == "utf16.txt" else "utf-8")
    else:
        delimiter = "\t" if name.endswith("tsv") else ","
        (folder / name).write_text("\n".join(f"{text}{delimiter}1" for text in ["text", *texts]))
    (tmp_path / "link").symlink_to(folder)
    columns = {"source": "text", "target": "text", "dataset": str(tmp_path / "link" if name == "a.csv" else folder)}
    assert pairs_of(make("", tmp_path / "cache", columns)) == sorted((text, text) for text in texts)
    data = text_data(folder, tmp_path / "cache", source="hub", dataset=str(folder), context=4)
    data.prepare()


@pytest.mark.parametrize("kind", ["jsonl folder", "save_to_disk"])
def test_faults_in_a_local_data_set_are_skipped_and_counted(tmp_path, caplog, kind):
    folder = tmp_path / "set"
    folder.mkdir()
    if kind == "save_to_disk":
        texts = pa.array([b"\xff", *(target.encode() for _, target in ROWS)]).view(pa.string())
        table = pa.table({"source": ["x", *(source for source, _ in ROWS)], "target": texts})
        datasets.Dataset(datasets.table.InMemoryTable(table)).save_to_disk(str(folder))
    else:
        lines = [json.dumps({"source": source, "target": target}) for source, target in ROWS]
        (folder / "train.jsonl").write_text("\n".join(['{"source": "x", "target": []}', *lines]))
    columns = {"dataset": str(folder)}
    with pytest.raises(InputError, match=r":1: target=target is .*\n.*on_bad_line=skip"):
        make("", tmp_path / "cache", columns).prepare()
    assert pairs_of(make("", tmp_path / "cache", {**columns, "on_bad_line": "skip"})) == sorted(ROWS)
    assert "skipped 1 invalid" in caplog.text
