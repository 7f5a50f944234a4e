"""Pairs are read from Python source, gettext catalogues, tables and data sets; errors name the file and the line."""

import ast
import gzip
import io
import json
import re
import struct
import textwrap
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard

from datamodules.catalogue_pairs import SYSTEM_FOLDER, catalogue_files, catalogue_rows
from datamodules.documents import stdlib_corpus
from datamodules.function_pairs import function_rows
from datamodules.pair_preparation import read_pairs
from datamodules.pair_sources import open_pair_source, open_tables, pair_text
from datamodules.pairs import PairData
from gpt2lab.data.pair_template import PairTemplate
from gpt2lab.errors import InputError
from gpt2lab.settings import TokenizerChoice
from launch.run.build import READ_BEFORE_IT_IS_BUILT
from tests.conftest import ROOT

CONF = ROOT / "conf" / "data"
ZEN = [
    line
    for line in ast.literal_eval(repr(__import__("codecs").decode(__import__("this").s, "rot13"))).splitlines()
    if line
]
GERMAN = {
    "Cancel": "Abbrechen",
    "Open file": "Datei öffnen",
    "No such file": "Keine solche Datei",
    "%d files": "%d Dateien",
}
COLUMNS = ("source", "target")


def make(file: Path | str, cache: Path, changed: dict[str, object] | None = None) -> PairData:
    arguments = {
        "name": "pairs",
        "prompt": "{source}\n\n",
        "response": "{target}",
        "source": "source",
        "target": "target",
        "path": str(file),
        "tokenizer": TokenizerChoice("bpe", 300),
        "context": 256,
        "batch_sequences": 4,
        "accumulate": 1,
        "seed": 7,
        "cache_dir": str(cache),
    }
    return PairData(**{**arguments, **(changed or {})})


def preset(name: str, cache: Path, changed: dict[str, object] | None = None) -> PairData:
    """A preset of conf/data, with its own keys, as the launcher builds it."""
    content = yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))
    keys = {key: value for key, value in content["data"].items() if key not in ("_target_", *READ_BEFORE_IT_IS_BUILT)}
    return make("", cache, {**keys, "source": content["source"], "target": content["target"], **(changed or {})})


def pairs_of(data: PairData) -> list[tuple[str, str]]:
    """All pairs that were collected, sorted."""
    data.prepare()
    folders = [file.parent for file in (data.cache_dir / "pairs").glob("*/pairs.jsonl")]
    return sorted(pair for folder in folders for pair in read_pairs(folder))


# Functions


@pytest.fixture(scope="session")
def functions() -> list[dict[str, str]]:
    """The functions of every sixth file of the standard library."""
    return [row for one in islice(stdlib_corpus().documents(), 0, None, 6) for row in function_rows(one.text)]


def test_neither_code_nor_body_holds_the_docstring(functions):
    for row in functions[::4]:
        tree = ast.parse(textwrap.dedent(row["code"])).body[0]
        own = [ast.get_docstring(tree)] if isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef) else [None]
        assert own[0] != row["docstring"]
        assert row["code"].endswith(row["body"].rstrip())
        assert row["docstring"].strip().startswith(row["summary"])
        assert "\n" not in row["summary"]


def test_stub_and_body_together_are_the_function_again(functions):
    for row in functions[::4]:
        whole = ast.parse(f"{row['stub']}\n{row['body']}").body[0]
        assert isinstance(whole, ast.FunctionDef | ast.AsyncFunctionDef)
        # Docstrings left of their function's indentation are indented differently afterwards.
        assert (ast.get_docstring(whole) or "").split() == row["docstring"].split()
        assert len(whole.body) > 1


def test_functions_that_cannot_be_split_are_skipped():
    source = """
        def one_line(): "Docstring."; return 1
        def only_a_docstring():
            "Docstring."
        def no_docstring():
            return 1
        class A:
            @property
            async def kept(self,
                           x=1):  # comment
                '''First line.

                Second line.'''
                # why
                return x
    """
    (row,) = [row for text in (textwrap.dedent(source), "this is no Python", "\0") for row in function_rows(text)]
    assert row["name"] == "kept"
    assert row["summary"] == "First line."
    assert row["code"].splitlines() == [
        "async def kept(self,",
        "               x=1):  # comment",
        "    # why",
        "    return x",
    ]
    assert row["body"] == "    # why\n    return x"


def test_summarize_reads_own_source_under_path(tmp_path):
    (tmp_path / "a.py").write_text('def add(a, b):\n    """Add two numbers."""\n    return a + b\n')
    (tmp_path / "b.py").write_text('def sub(a, b):\n    """Subtract b from a."""\n    return a - b\n')
    data = preset("summarize", tmp_path / "cache", {"path": str(tmp_path)})
    assert pairs_of(data) == [
        ("def add(a, b):\n    return a + b", "Add two numbers."),
        ("def sub(a, b):\n    return a - b", "Subtract b from a."),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["summarize", "complete"])
def test_the_function_presets_need_no_file(tmp_path, name):
    data = preset(name, tmp_path / "cache")
    facts = data.prepare()
    assert facts.train_tokens > 10 * facts.val_tokens > 10_000
    assert 3_000 < len(data.train_samples) < 12_000


# Catalogues


def write_mo(file: Path, messages: dict[str, str]) -> None:
    """A .mo file as msgfmt writes it: header, tables of lengths and offsets, strings ended by NUL."""
    header = "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=(n != 1);\n"
    entries = sorted((key.encode(), value.encode()) for key, value in {"": header, **messages}.items())
    count, strings = len(entries), io.BytesIO()
    start = 28 + 16 * count
    tables: list[bytes] = []
    for side in (0, 1):
        for entry in entries:
            tables.append(struct.pack("<II", len(entry[side]), start + strings.tell()))
            strings.write(entry[side] + b"\0")
    head = struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(head + b"".join(tables) + strings.getvalue())


def test_mo_catalogues_give_each_distinct_pair_once(tmp_path):
    write_mo(tmp_path / "de/LC_MESSAGES/one.mo", {**GERMAN, "OK": "OK", "menu\x04Open": "Öffnen"})
    write_mo(tmp_path / "de/LC_MESSAGES/two.mo", {"Cancel": "Abbrechen", "%d dog\0%d dogs": "%d Hund\0%d Hunde"})
    write_mo(tmp_path / "fr/LC_MESSAGES/one.mo", {"Cancel": "Annuler"})
    pairs = pairs_of(preset("translate", tmp_path / "cache", {"path": str(tmp_path)}))
    assert pairs == sorted([*GERMAN.items(), ("Open", "Öffnen"), ("%d dog", "%d Hund")])


PO = r"""
msgid ""
msgstr ""
"Content-Type: text/plain; charset=UTF-8\n"

#: main.c:3
msgid "Open file"
msgstr "Datei öffnen"

#, c-format, fuzzy
msgid "Guess"
msgstr "Vermutung"

#, c-format
msgctxt "menu"
msgid "A \"long\"\t"
"text\n"
msgstr ""
"Ein \"langer\"\t"
"Text\n"

msgid "%d dog"
msgid_plural "%d dogs"
msgstr[0] "%d Hund"
msgstr[1] "%d Hunde"

msgid "Untranslated"
msgstr ""

#~ msgid "Obsolete"
#~ msgstr "Veraltet"
"""


def test_po_skips_fuzzy_obsolete_and_untranslated_entries(tmp_path):
    (tmp_path / "de.po").write_text(PO)
    expected = {"Open file": "Datei öffnen", 'A "long"\ttext\n': 'Ein "langer"\tText\n', "%d dog": "%d Hund"}
    for path in (tmp_path, tmp_path / "de.po"):
        rows = catalogue_rows(catalogue_files(str(path), "de"))
        assert {row["source"]: row["target"] for row in rows} == expected


def test_po_catalogue_is_read_in_the_charset_of_its_header(tmp_path, caplog):
    (tmp_path / "de.po").write_bytes(PO.replace("UTF-8", "ISO-8859-1").encode("latin-1"))
    rows = {row["source"]: row["target"] for row in catalogue_rows([tmp_path / "de.po"])}
    assert rows["Open file"] == "Datei öffnen"
    assert not caplog.text


def test_mo_catalogue_is_read_in_the_charset_of_its_header(tmp_path, caplog):
    header = "Last-Translator: Jürgen\nContent-Type: text/plain; charset=ISO-8859-1\n"
    messages = [
        (text.encode("latin-1"), theirs.encode("latin-1")) for text, theirs in (("", header), ("Open", "Öffnen"))
    ]
    start, table, strings = 28 + 16 * len(messages), [], b""
    for texts in zip(*messages, strict=True):
        for text in texts:
            table += [len(text), start + len(strings)]
            strings += text + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, len(messages), 28, 28 + 8 * len(messages), 0, 0)
    (tmp_path / "de.mo").write_bytes(head + struct.pack(f"<{len(table)}I", *table) + strings)
    assert list(catalogue_rows([tmp_path / "de.mo"])) == [
        {"source": "Open", "target": "Öffnen", "file": str(tmp_path / "de.mo")}
    ]
    assert not caplog.text


def test_broken_catalogue_is_named_and_skipped(tmp_path, caplog):
    write_mo(tmp_path / "de/a.mo", GERMAN)
    (tmp_path / "de" / "b.mo").write_bytes(b"no catalogue at all, really")
    assert len(list(catalogue_rows(catalogue_files(str(tmp_path), "de")))) == len(GERMAN)
    assert "b.mo is not a readable catalogue" in caplog.text


def test_missing_catalogue_is_an_error_with_the_languages_found(tmp_path):
    write_mo(tmp_path / "fr/LC_MESSAGES/one.mo", {"Cancel": "Annuler"})
    with pytest.raises(InputError, match=r"(?s)No catalogue of language 'de'.*Languages found: fr\..*data.language"):
        preset("translate", tmp_path / "cache", {"path": str(tmp_path)}).prepare()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"contains no \.mo or \.po file"):
        catalogue_files(str(tmp_path / "empty"), "de")
    with pytest.raises(InputError, match="neither a folder of gettext catalogues"):
        catalogue_files(str(tmp_path / "nowhere"), "de")


def test_installed_catalogues_are_parallel_text():
    languages = Counter(file.parts[4] for file in Path(SYSTEM_FOLDER).glob("*/LC_MESSAGES/*.mo"))
    if not languages:
        pytest.skip(f"no catalogue under {SYSTEM_FOLDER}")
    language = languages.most_common(1)[0][0]
    rows = list(catalogue_rows(catalogue_files("", language)))
    assert len({(row["source"], row["target"]) for row in rows}) == len(rows) > 10
    assert all(row["source"] != row["target"] and "\x04" not in row["source"] for row in rows)


def test_translate_swaps_direction_with_its_columns(tmp_path):
    write_mo(tmp_path / "de/one.mo", GERMAN)
    data = preset("translate", tmp_path / "cache", {"path": str(tmp_path), "source": "target", "target": "source"})
    assert pairs_of(data) == sorted((german, english) for english, german in GERMAN.items())


# Tables


def rows_to_read() -> list[dict[str, str]]:
    return [{"question": f"{line}?", "answer": f'"{line}", they say'} for line in ZEN]


def table_bytes(ending: str) -> bytes:
    """The Zen of Python as a table of this kind."""
    rows = rows_to_read()
    if ending == ".jsonl":
        return "\n".join(map(json.dumps, rows)).encode()
    if ending == ".parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        return sink.getvalue()
    if ending == ".tsv":
        return "\n".join(["question\tanswer", *(f"{row['question']}\t{row['answer']}" for row in rows)]).encode()
    quoted = [[f'"{text.replace(chr(34), chr(34) * 2)}"' for text in row.values()] for row in rows]
    return "\r\n".join(["question,answer", *map(",".join, quoted)]).encode("utf-8-sig")


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.gz", ".tsv.zst"])
def test_any_two_columns_of_any_table_are_pairs(tmp_path, ending):
    plain, _, compression = ending[1:].partition(".")
    content = table_bytes(f".{plain}")
    if compression:
        content = gzip.compress(content) if compression == "gz" else zstandard.compress(content)
    (tmp_path / f"table{ending}").write_bytes(content)
    data = make(tmp_path / f"table{ending}", tmp_path / "cache", {"source": "question", "target": "answer"})
    assert pairs_of(data) == sorted((row["question"], row["answer"]) for row in rows_to_read())


def test_a_translation_table_needs_no_header(tmp_path):
    (tmp_path / "pairs.tsv").write_text("".join(f"{en}\t{de}\n" for en, de in GERMAN.items()))
    data = preset("translate", tmp_path / "cache", {"path": str(tmp_path / "pairs.tsv"), "source": "1", "target": "2"})
    assert pairs_of(data) == sorted(GERMAN.items())


def test_columns_within_columns_and_joined_columns():
    row = {"translation": {"de": "Hallo", "en": "Hello"}, "a.b": "dotted", "x": "1", "y": "", "z": None}
    assert pair_text(row, "translation.de") == "Hallo"
    assert pair_text(row, "a.b") == "dotted"
    assert pair_text(row, "x+y") == pair_text(row, "x+z") == "1"
    assert pair_text(row, "x + translation.en") == "1\n\nHello"
    for missing in ("w", "x+w", "translation.fr", "x.y"):
        with pytest.raises(KeyError):
            pair_text(row, missing)


def test_missing_column_is_an_error_with_the_columns_found(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"translation": {"de": "Hallo", "en": "Hello"}, "id": 3}')
    with pytest.raises(
        InputError, match=r"source=source: the data have no such column.\nColumns found: id, translation.de"
    ):
        make(file, tmp_path / "cache").prepare()


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.jsonl", '{"source": "a", "target": "b"}\n{"source": "c", "target"\n{"source": "e", "target": "f"}\n', 2),
        ("a.jsonl", '{"source": "a", "target": "b"}\n\n["c", "d"]\n{"source": "e", "target": "f"}\n', 3),
        ("a.csv", "source,target\na,b\nc\ne,f\n", 3),
        ("a.tsv", "source\ttarget\na\tb\nc\td\te\ne\tf\n", 3),
    ],
)
def test_broken_line_is_an_error_or_is_skipped_and_counted(tmp_path, caplog, name, content, line):
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(InputError, match=rf"{re.escape(str(file))}:{line}: .*\n.*on_bad_line=skip"):
        make(file, tmp_path / "cache").prepare()
    assert pairs_of(make(file, tmp_path / "cache", {"on_bad_line": "skip"})) == [("a", "b"), ("e", "f")]
    assert "skipped 1 invalid lines" in caplog.text


def test_rows_with_an_empty_side_are_skipped_and_counted(tmp_path, caplog):
    file = tmp_path / "a.jsonl"
    rows = [("a", "b"), ("", "x"), ("y", " \n"), (None, "z"), ("c", "d")]
    file.write_text("\n".join(json.dumps({"source": source, "target": target}) for source, target in rows))
    assert pairs_of(make(file, tmp_path / "cache")) == [("a", "b"), ("c", "d")]
    assert "skipped 3 rows with an empty source or target" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "contains no pair"),
        ('{"source": "", "target": "b"}', "contains no pair: 1 rows"),
        ('{"source": "a", "target": "b"}\n{"source": "a", "target": "c"}', "contains one source text"),
    ],
)
def test_too_few_pairs_are_refused(tmp_path, content, message):
    file = tmp_path / "a.jsonl"
    file.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        make(file, tmp_path / "cache").prepare()
    assert str(caught.value).count("\n") < 5


def test_pairs_that_are_all_too_long_are_refused(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"source": line, "target": line * 9}) for line in ZEN))
    with pytest.raises(InputError, match=r"none of the \d+ training pairs fits in context=32"):
        make(file, tmp_path / "cache", {"context": 32}).prepare()


@pytest.mark.parametrize(
    ("path", "message"),
    [("", "data=pairs needs path=FILE"), ("nowhere.jsonl", "no such file"), ("a.docx", "unknown kind of file")],
)
def test_missing_table_is_refused(tmp_path, path, message):
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(InputError, match=message):
        open_tables(path and str(tmp_path / path), "path", "stop", COLUMNS)


# Templates


@pytest.mark.parametrize(
    ("prompt", "response", "message"),
    [
        (
            "{instruction}\n",
            "{target}",
            r"unknown field \{instruction\}.\nAllowed: \{source\}.*\n.*source=instruction",
        ),
        ("no field", "{target}", r"has \{source\} 0 times"),
        ("{source}{source}", "{target}", r"has \{source\} 2 times"),
        ("{source}", "{source}", r"unknown field \{source\}"),
    ],
)
def test_a_template_with_a_wrong_field_is_refused(prompt, response, message):
    with pytest.raises(InputError, match=message):
        PairTemplate(prompt, response)


# The Hub, replaced by local data sets that take the same code path


@pytest.fixture
def parallel() -> datasets.DatasetDict:
    """A data set like WMT: one column with both languages, and a validation split."""
    rows = [{"translation": {"en": english, "de": german}} for english, german in GERMAN.items()]
    return datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(rows), "validation": datasets.Dataset.from_list(rows[:1])}
    )


def test_translate_reads_a_data_set_and_splits_it_by_message(tmp_path, parallel):
    parallel.save_to_disk(tmp_path / "set")
    columns = {"source": "translation.en", "target": "translation.de"}
    data = preset("translate", tmp_path / "cache", {"dataset": str(tmp_path / "set"), **columns})
    assert pairs_of(data) == sorted(GERMAN.items())
    assert len(data.train_samples) + len(data.val_samples) == len(GERMAN)


@pytest.mark.parametrize("stored", ["save_to_disk", "files"])
def test_validation_split_of_a_hub_preset_is_not_trained_on(tmp_path, parallel, stored):
    folder = tmp_path / "set"
    if stored == "save_to_disk":
        parallel.save_to_disk(folder)
    else:
        folder.mkdir()
        for split, rows in parallel.items():
            rows.to_json(folder / f"{split}.jsonl")
    data = preset("wmt14_de_en", tmp_path / "cache", {"dataset": str(folder), "config": ""})
    data.prepare()
    assert len(data.train_samples) == 3
    (batch,) = data.val_dataloader()
    assert batch.references == ["Cancel"]


def test_dolly_appends_the_context_to_the_instruction(tmp_path):
    rows = [
        {
            "instruction": f"Explain: {line}",
            "context": "From the Zen of Python." * (n % 2),
            "response": line,
            "category": "qa",
        }
        for n, line in enumerate(ZEN)
    ]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    pairs = dict(pairs_of(preset("dolly", tmp_path / "cache", {"dataset": str(tmp_path / "set")})))
    assert pairs[f"Explain: {ZEN[0]}"] == ZEN[0]
    assert pairs[f"Explain: {ZEN[1]}\n\nFrom the Zen of Python."] == ZEN[1]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("xsum", {"document": "{}", "summary": "{}", "id": "1"}),
        ("cnn_dailymail", {"article": "{}", "highlights": "{}", "id": "1"}),
        ("opus100_en_zh", {"translation": {"en": "{}", "zh": "{}"}}),
    ],
)
def test_hub_presets_name_the_columns_of_their_data_sets(tmp_path, name, row):
    rows = [json.loads(json.dumps(row).replace("{}", f"text {n}")) for n in range(6)]
    splits = {"train": datasets.Dataset.from_list(rows), "validation": datasets.Dataset.from_list(rows[:2])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    data = preset(name, tmp_path / "cache", {"dataset": str(tmp_path / "set")})
    data.prepare()
    assert (len(data.train_samples), len(data.val_samples)) == (4, 2)


def test_missing_split_or_data_set_is_refused(tmp_path, parallel, monkeypatch):
    parallel.save_to_disk(tmp_path / "set")
    with pytest.raises(InputError, match="has no split 'test'; it has: train, validation"):
        preset("wmt14_de_en", tmp_path / "cache", {"dataset": str(tmp_path / "set"), "split": "test"}).prepare()


def test_path_replaces_the_source_of_a_preset(tmp_path):
    file = tmp_path / "news.jsonl"
    file.write_text("\n".join(json.dumps({"document": line, "summary": line[:9]}) for line in ZEN))
    assert pairs_of(preset("xsum", tmp_path / "cache", {"path": str(file)})) == sorted((line, line[:9]) for line in ZEN)
    source = open_pair_source("functions", str(file), "", "stop", COLUMNS)
    assert next(source.rows()) == {"document": ZEN[0], "summary": ZEN[0][:9]}
