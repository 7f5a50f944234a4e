"""Documents of a data set on the Hub or in a local folder, loaded with `datasets`, downloaded or streamed."""

import functools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datamodules.documents import Corpus, Document, files_identity, record_document
from gpt2lab.errors import InputError
from gpt2lab.storage.hub import is_hub_id, require_hub

NO_HUB = (
    "Give a local data set folder (data.dataset=FOLDER), or use data without network: data=stdlib, data=text path=…"
)


def hub_corpus(
    name: str, dataset: str, config: str, revision: str, split: str, val_split: str, text_column: str, streaming: bool
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
    if Path(dataset).is_dir():
        files = sorted(file for file in Path(dataset).rglob("*") if file.is_file())
        identity["files"] = files_identity(files, Path(dataset))  # `datasets` derives the splits from the names
    else:
        identity["revision"] = revision

    @functools.cache
    def rows(side: str) -> Iterable[dict[str, Any]]:
        return load_hub_split(dataset, config, side, streaming, revision)

    def documents(side: str) -> Iterator[Document]:
        for row in rows(side):
            if text_column not in row:
                raise InputError(
                    f"{dataset}: no column {text_column!r}.\nColumns found: {', '.join(row)}.\n"
                    "Name the text column: data.text_column=NAME"
                )
            yield from record_document(row[text_column])

    validation = (lambda: documents(val_split)) if val_split else None
    return Corpus(name, identity, lambda: documents(split), validation)


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
    try:
        if (Path(dataset) / "dataset_dict.json").is_file() or (Path(dataset) / "state.json").is_file():
            stored = datasets.load_from_disk(dataset)
            return stored[split] if isinstance(stored, datasets.DatasetDict) else stored
        return datasets.load_dataset(
            dataset, config or None, split=split, streaming=streaming, revision=revision or None
        )
    except KeyError as error:
        raise InputError(f"{dataset} has no split {split!r}; it has: {', '.join(stored)}.") from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:  # RuntimeError: a script
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise InputError(
            f"Cannot load the data set {dataset} (config {config or 'default'}, split {split}): {reason}\n"
            f"Check the name and the network (HF_TOKEN for gated data).\n{NO_HUB}"
        ) from error
