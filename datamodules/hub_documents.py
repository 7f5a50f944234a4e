"""Documents of a data set on the Hub or in a local folder that `datasets` reads, downloaded or streamed."""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datamodules.documents import Corpus, Document
from gpt2lab.errors import InputError

log = logging.getLogger(__name__)


def hub_corpus(
    name: str, dataset: str, config: str, split: str, val_split: str, text_column: str, streaming: bool
) -> Corpus:
    """One text column of a data set; `val_split` empty takes the validation text out of `split` by hash.

    Raises:
        InputError: the data set, split or column is not to be had.
    """
    if not dataset:
        raise InputError("data=hub needs data.dataset=HUB_ID or a local data set folder.")
    training = load_hub_split(dataset, config, split, streaming)
    validation = load_hub_split(dataset, config, val_split, streaming) if val_split else None
    identity = {"dataset": dataset, "config": config, "split": split, "val_split": val_split, "column": text_column}
    if not streaming:
        identity["fingerprint"] = training._fingerprint
    elif Path(dataset).exists():
        identity["modified"] = max(file.stat().st_mtime_ns for file in Path(dataset).rglob("*"))

    def documents(rows: Iterable[dict[str, Any]], side: str) -> Iterator[Document]:
        for number, row in enumerate(rows):
            if text_column not in row:
                raise InputError(
                    f"{dataset}: no column {text_column!r}.\nColumns there: {', '.join(row)}.\n"
                    "Name the text column: data.text_column=NAME"
                )
            if row[text_column] and row[text_column].strip():
                yield Document(f"{side}#{number}", row[text_column])

    return Corpus(
        name,
        identity,
        lambda: documents(training, split),
        (lambda: documents(validation, val_split)) if validation is not None else None,
    )


def load_hub_split(dataset: str, config: str, split: str, streaming: bool, revision: str = "") -> Any:
    """A `datasets` split: a folder made by `save_to_disk`, a folder of data files, or a Hub id (at a branch or commit).

    Raises:
        InputError: not to be had; says what to do.
    """
    import datasets

    try:
        if (Path(dataset) / "dataset_dict.json").is_file() or (Path(dataset) / "state.json").is_file():
            stored = datasets.load_from_disk(dataset)
            return stored[split] if isinstance(stored, datasets.DatasetDict) else stored
        return datasets.load_dataset(dataset, config or None, split=split, streaming=streaming, revision=revision or None)
    except KeyError as error:
        raise InputError(f"{dataset} has no split {split!r}; it has: {', '.join(stored)}.") from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:  # RuntimeError: a script
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise InputError(
            f"Cannot load the data set {dataset} (config {config or 'default'}, split {split}): {reason}\n"
            "Check the name and the network (HF_TOKEN for gated data), give a local folder (data.dataset=FOLDER),\n"
            "or use data that need no network: data=stdlib, or data=text path=…"
        ) from error
