"""Documents and records of a data set on the Hub, downloaded or streamed, or in a local folder."""

import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datamodules.compressed_files import plain_ending
from datamodules.delimited_records import DELIMITERS
from datamodules.documents import Corpus, Document, column_text, files_identity, record_document
from datamodules.record_files import ROWS, arrow_records, file_records
from datamodules.records import Convert, Item, Labels, label_names, sound_records
from gpt2lab.errors import InputError
from gpt2lab.storage.hub import is_hub_id, require_hub

NO_HUB = (
    "Give a local data set folder (data.dataset=FOLDER), or use data without network: data=stdlib, data=text path=…"
)
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
    rows = load_hub_split(dataset, config, split, streaming, revision)
    labels = label_names(rows.features.to_dict()) if rows.features else {}

    def records(convert: Convert[Item]) -> Iterator[Item]:
        tables = rows.with_format("arrow").iter(ROWS)
        return sound_records(f"{dataset} ({split})", arrow_records(tables, dataset, labels), on_bad_line, convert)

    if not streaming and "files" not in identity:
        identity["fingerprint"] = rows._fingerprint
    return Split(records, identity)


def _local_files(dataset: str, config: str, split: str) -> tuple[list[Path], Labels] | None:
    """Return the files of a split of a local folder and the names of their labels; None if `datasets` must read it."""
    import datasets

    if not Path(dataset).is_dir() or _is_saved(dataset):
        return None
    with _loaded_folder(dataset) as folder, _load_errors(dataset, config, split):
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


def load_hub_split(dataset: str, config: str, split: str, streaming: bool, revision: str = "") -> Any:
    """Load a split of a `save_to_disk` folder, a folder of data files, or a Hub id (at a branch or commit).

    Raises:
        InputError: the data set or split cannot be loaded.
    """
    import datasets

    if is_hub_id(dataset):
        require_hub(f"The data set {dataset}", NO_HUB)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    with _loaded_folder(dataset) as source, _load_errors(dataset, config, split):
        if _is_saved(dataset):
            stored = datasets.load_from_disk(dataset)
            if isinstance(stored, datasets.DatasetDict) and split not in stored:
                raise InputError(f"{dataset} has no split {split!r}; it has: {', '.join(stored)}.")
            return stored[split] if isinstance(stored, datasets.DatasetDict) else stored
        streaming = streaming and not _is_pattern(dataset)  # a stream is read later, without the links
        return datasets.load_dataset(
            source, config or None, split=split, streaming=streaming, revision=revision or None
        )


def _is_saved(dataset: str) -> bool:
    """Whether it is a folder written by `save_to_disk`."""
    return (Path(dataset) / "dataset_dict.json").is_file() or (Path(dataset) / "state.json").is_file()


@contextmanager
def _loaded_folder(dataset: str) -> Iterator[str]:
    """Yield the Hub id, or the folder without symbolic links in its path.

    Instead of a folder with `[`, `*` or `?`, which is a pattern for `datasets`, yield a copy that consists of links.
    """
    if _is_pattern(dataset):
        with TemporaryDirectory() as scratch:
            copy = Path(scratch).resolve() / "data"
            yield str(shutil.copytree(Path(dataset).resolve(), copy, copy_function=os.symlink))
    else:
        yield str(Path(dataset).resolve()) if Path(dataset).is_dir() else dataset


def _is_pattern(dataset: str) -> bool:
    return Path(dataset).is_dir() and has_magic(str(Path(dataset).resolve()))


@contextmanager
def _load_errors(dataset: str, config: str, split: str) -> Iterator[None]:
    import datasets

    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:  # RuntimeError: a script
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise InputError(
            f"Cannot load the data set {dataset} (config {config or 'default'}, split {split}): {reason}\n"
            f"Check the name and the network (HF_TOKEN for gated data).\n{NO_HUB}"
        ) from error
