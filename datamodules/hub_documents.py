"""Documents and records of a data set on the Hub, downloaded or streamed, or in a local folder."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.compressed_files import plain_ending
from datamodules.delimited_records import DELIMITERS
from datamodules.documents import Corpus, Document, column_text, files_identity, record_document
from datamodules.hub_loading import is_saved, load_errors, load_split, loaded_folder
from datamodules.record_files import ROWS, arrow_records, file_records
from datamodules.records import Convert, Item, Labels, label_names, sound_records
from gpt2lab.errors import InputError

READ_HERE = {".jsonl", ".parquet", ".txt", *DELIMITERS}  # kinds of local files with the reader of path=


def hub_corpus(
    name: str,
    dataset: str,
    config: str,
    revision: str,
    split: str,
    val_split: str,
    text_column: str,
    streaming: bool,
    on_bad_line: str,
) -> Corpus:
    """Return the corpus of a text column; with an empty `val_split` validation documents are split off by hash.

    A Hub data set is identified by name and revision, so prepared tokens are found without a connection. Without a
    revision they are those of the first preparation.

    Raises:
        InputError: no data set is given. Load errors are raised by the first access to documents.
    """
    if not dataset:
        raise InputError("data=hub needs data.dataset=HUB_ID or a local data set folder.")
    identity = {"dataset": dataset, "config": config, "split": split, "val_split": val_split, "column": text_column}
    identity |= {"on_bad_line": on_bad_line}
    identity |= {"files": folder_identity(dataset)} if Path(dataset).is_dir() else {"revision": revision}
    opened = functools.cache(lambda side: open_split(dataset, config, revision, side, on_bad_line, streaming))

    def documents(side: str) -> Iterator[Document]:
        for text in opened(side).records(functools.partial(column_text, column=text_column)):
            yield from record_document(text)

    validation = (lambda: documents(val_split)) if val_split else None
    return Corpus(name, identity, lambda: documents(split), validation)


def folder_identity(folder: str) -> str:
    """Return the hash of all files below a folder and their names, from which `datasets` derives the splits."""
    return files_identity(sorted(file for file in Path(folder).rglob("*") if file.is_file()), Path(folder))


@dataclass(frozen=True)
class Split:
    """One split of a data set.

    Attributes:
        records: iterates over the converted records.
        identity: JSON value that changes when the records change.
    """

    records: Callable[[Convert[Any]], Iterator[Any]]
    identity: dict[str, Any]


def open_split(
    dataset: str, config: str, revision: str, split: str, on_bad_line: str, streaming: bool = False
) -> Split:
    """Open a split of a data set on the Hub or in a local folder.

    Raises:
        InputError: the data set or split cannot be loaded.
    """
    identity = {"dataset": dataset, "config": config, "split": split, "on_bad_line": on_bad_line}
    if Path(dataset).is_dir():
        identity["files"] = folder_identity(dataset)
    local = _local_files(dataset, config, split)
    if local is not None:
        files, labels = local
        return Split(
            lambda convert: (
                item for file in files for item in file_records(file, on_bad_line, convert, labels=labels)
            ),
            identity,
        )
    rows = load_split(dataset, config, split, streaming, revision)
    labels = label_names(rows.features.to_dict()) if rows.features else {}

    def tables() -> Iterator[Any]:
        with load_errors(dataset, config, split):  # a stream is downloaded here
            yield from rows.with_format("arrow").iter(ROWS)

    def records(convert: Convert[Item]) -> Iterator[Item]:
        found = arrow_records(tables(), dataset, labels)
        return sound_records(f"{dataset} ({split})", found, on_bad_line, convert)

    if not streaming and "files" not in identity:
        identity["fingerprint"] = rows._fingerprint
    return Split(records, identity)


def _local_files(dataset: str, config: str, split: str) -> tuple[list[Path], Labels] | None:
    """Return the files of a split of a local folder and the names of their labels; None if `datasets` must read it."""
    import datasets

    if not Path(dataset).is_dir() or is_saved(dataset):
        return None
    with loaded_folder(dataset) as folder, load_errors(dataset, config, split):
        builder = datasets.load_dataset_builder(folder, config or None)
        data_files = (builder.config.data_files or {}).get(split, ())
        files = [Path(dataset, Path(file).relative_to(folder)) for file in data_files if Path(file).is_file()]
    defaults = vars(type(builder.config)()) | {key: vars(builder.config)[key] for key in vars(datasets.BuilderConfig())}
    if files and all(plain_ending(file) == ".tsv" for file in files):
        defaults["sep"] = "\t"
    is_plain = vars(builder.config) == defaults  # a README.md may contain options for `datasets`
    if not files or len(files) < len(data_files) or not is_plain or {plain_ending(file) for file in files} - READ_HERE:
        return None
    features = builder.info.features
    return files, label_names(features.to_dict()) if features else {}
