"""Check presets: reads the first rows of every preset of conf/data and prints a table.

    python -m launch.commands.check_presets
    python -m launch.commands.check_presets fineweb_edu xsum

Data sets of the Hub are streamed, so only the beginning of each split is downloaded. The exit code is 1 if a preset
cannot be read.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpt2lab.errors import InputError
from gpt2lab.storage.utf8 import check_process
from gpt2lab.system.terminal import track
from launch import logging_setup
from launch.config.groups import values
from launch.config.schema import RunConfig
from launch.evaluate.eval_data import compose_data
from launch.exit_codes import FAILED, Exit, run_and_exit

ROWS = 3
READ, UNREADABLE, SKIPPED = "read", "UNREADABLE", "skipped"


@dataclass(frozen=True)
class Checked:
    """Result for one split of a preset; `example` is the first text, or the reason why there is none."""

    preset: str
    source: str
    split: str
    result: str
    rows: int = 0
    example: str = ""


def check_preset(preset: str) -> list[Checked]:
    """Read the first rows of each split of a preset.

    Raises:
        InputError: there is no such preset.
    """
    config = compose_data(preset)
    dataset = str(config.data.get("dataset") or "")
    splits = [str(config.data.get(key) or "") for key in ("split", "val_split")] if dataset else [""]
    return [_check_split(preset, config, dataset, split) for split in splits if split or not dataset]


def _check_split(preset: str, config: RunConfig, dataset: str, split: str) -> Checked:
    source = dataset or str(config.data.get("reader") or config.data.get("source"))
    if not dataset and source in ("text", "bin", "hub", "tables"):
        return Checked(preset, "your own data", split, SKIPPED)
    try:
        texts = list(islice(_texts(config, source, dataset, split), ROWS))
    except InputError as error:
        return Checked(preset, source, split, UNREADABLE, example=str(error).splitlines()[0])
    example = next((text for text in texts if text.strip()), "")
    return Checked(preset, source, split, READ if example else UNREADABLE, len(texts), example or "no text")


def _texts(config: RunConfig, source: str, dataset: str, split: str) -> Iterator[str]:
    from datamodules.documents import column_text, packages_corpus, stdlib_corpus
    from datamodules.hub_documents import open_split
    from datamodules.pair_preparation import pair_of_row
    from datamodules.pair_sources import open_pair_source

    if source in ("stdlib", "packages"):
        corpus = stdlib_corpus() if source == "stdlib" else packages_corpus()
        yield from (document.text for document in corpus.documents())
        return
    columns = (config.source, config.target)
    convert: Any = partial(pair_of_row, columns=columns)
    if not config.takes_pairs:
        convert = partial(column_text, column=config.data["text_column"])
    if dataset:
        name, revision = str(config.data.get("config") or ""), str(config.data.get("revision") or "")
        records = open_split(dataset, name, revision, split, "stop", streaming=True).records
    else:
        records = open_pair_source(source, "", str(config.data.get("language") or ""), "stop", columns).records
    for item in records(convert):
        yield " → ".join(item[:2]) if config.takes_pairs else item


def _print(checked: list[Checked]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("preset", "source", "split", "result", "rows"):
        table.add_column(name, overflow="fold", justify="right" if name == "rows" else "left")
    table.add_column("first text, or reason", max_width=72)
    for one in checked:
        example = " ".join(one.example.split())
        shown = example if one.result == UNREADABLE else example[:60]
        cells = (one.preset, one.source, one.split, one.result, str(one.rows or ""), shown)
        table.add_row(*(Text(cell) for cell in cells))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)


def _program(arguments: list[str]) -> None:
    check_process(arguments)
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    logging_setup.configure_logging()
    presets = arguments or values("data")
    checked = [one for preset in track(presets, "presets", len(presets)) for one in check_preset(preset)]
    _print(checked)
    failed = sorted({one.preset for one in checked if one.result == UNREADABLE})
    if failed:
        raise Exit(FAILED, f"{len(failed)} presets cannot be read: {', '.join(failed)}")


if __name__ == "__main__":
    run_and_exit(lambda: _program(sys.argv[1:]))
