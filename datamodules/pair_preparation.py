"""Preparation of pairs: rows → tokenized pairs on disk, with memory independent of the number of pairs.

Step (1) collect: rows → pairs.jsonl, one {"source", "target"} per line; tokenizers are trained on it.
Step (2) split: by a hash of the source text, or separate validation pairs; no source text is on both sides.
Step (3) encode: each side → a PairFile.
"""

import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from datamodules.pair_sources import FILE, PairSource, pair_text
from datamodules.records import RecordFault, Row
from datamodules.token_preparation import HASHES, hash_text
from gpt2lab.data.pair_file import PairFileWriter
from gpt2lab.data.pair_template import PairTemplate, encode_pairs
from gpt2lab.errors import InputError
from gpt2lab.storage.damaged_files import warn_once
from gpt2lab.storage.prepared_cache import read_ledger
from gpt2lab.system.terminal import Phase, track

log = logging.getLogger(__name__)

SIDES = {"train": "training", "val": "validation"}  # folder of a side → its name in messages
CHUNK = 256  # pairs tokenized in one call

Pairs = Callable[[], Iterator[tuple[str, str, str]]]  # (source, target, their file or "")


def collect_pairs(folder: Path, source: PairSource, columns: tuple[str, str], name: str) -> dict[str, Any]:
    """Write folder/pairs.jsonl; rows with an empty source or target are skipped and counted.

    Returns:
        sha256 of the pairs; hashes: the smallest and largest hash of a source text.

    Raises:
        InputError: a record is invalid, a column does not exist, or there is no pair.
    """
    digest, pairs, empty, smallest, largest = sha256(), 0, 0, HASHES, -1
    with (folder / "pairs.jsonl").open("wb") as file:
        texts = source.records(partial(pair_of_row, columns=columns))
        for source_text, target_text, row_file in track(texts, f"prepare {name}: read", unit="pairs"):
            if not source_text.strip() or not target_text.strip():
                empty += 1
                continue
            pair = {"source": source_text, "target": target_text}
            digest.update(_line(pair))  # independent of the files' paths
            file.write(_line({**pair, FILE: row_file} if row_file else pair))
            pairs += 1
            smallest, largest = min(smallest, hash_text(source_text)), max(largest, hash_text(source_text))
    if pairs == 0:
        raise InputError(
            f"data={name} contains no pair: {empty} rows, none with text in both columns {columns[0]} and "
            f"{columns[1]}.\nGive rows with text on both sides, or name other columns: source=NAME target=NAME"
        )
    if empty:
        log.warning("data=%s: skipped %d rows with an empty source or target", name, empty)
    return {"sha256": digest.hexdigest(), "hashes": [smallest, largest]}


def _line(content: dict[str, str]) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def pair_of_row(row: Row, name: str, columns: tuple[str, str]) -> tuple[str, str, str]:
    """Return (source, target, file or "") of a row.

    Raises:
        RecordFault: a column does not exist or is not text.
    """
    source, target = _text(row, name, columns[0], "source"), _text(row, name, columns[1], "target")
    return source, target, str(row.get(FILE) or "")


def _text(row: Row, name: str, column: str, key: str) -> str:
    fix = "Name two columns of text: source=NAME target=NAME"
    try:
        return pair_text(row, column, name)
    except RecordFault as fault:
        names = _names(column, row.get(column))
        detail = fault.detail if names == [column] else f"; its fields are {', '.join(names)}"
        raise RecordFault(f"{key}={column} is {fault.reason}", detail, fault.fix or fix) from fault
    except KeyError:
        in_order = sorted(row, key=lambda outer: isinstance(row[outer], dict))  # columns with fields last
        names = [name for outer in in_order for name in _names(outer, row[outer])]
        found = f".\nColumns found: {', '.join(names)}"
        raise RecordFault(f"{key}={column}: the data have no such column", found, fix) from None


def _names(column: str, value: Any) -> list[str]:
    """Return the names under which a column can be given: of an object those of its fields."""
    return [f"{column}.{inner}" for inner in value] if isinstance(value, dict) else [column]


def read_pairs(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (source, target) of the pairs that `collect_pairs` wrote to `folder`, in order."""
    return ((source, target) for source, target, _ in read_pairs_with_files(folder))


def read_pairs_with_files(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (source, target, file) of the same pairs; the file is "" if it is not recorded."""
    with (folder / "pairs.jsonl").open("rb") as file:
        for line in file:
            pair = json.loads(line)
            yield pair["source"], pair["target"], pair.get(FILE, "")


def group_number(source: str, file: str) -> int:
    """Return the document group of a pair, a signed 64-bit hash of its file if recorded, else of its source text."""
    number = hash_text(f"file\0{file}" if file else source)
    return number - HASHES if number >= HASHES // 2 else number


def split_by_hash(folder: Path, hashes: list[int], val_fraction: float, name: str) -> tuple[Pairs, Pairs]:
    """Return (training pairs, validation pairs) with about `val_fraction` of the source texts, at least one each.

    The hash does not depend on the run's seed, so runs with different seeds validate on the same pairs.

    Raises:
        InputError: fewer than two different source texts.
    """
    smallest, largest = hashes
    if smallest == largest:
        raise InputError(
            f"data={name} contains one source text; training and validation need one each.\n"
            "Give more pairs, or separate validation pairs: val_path=FILE"
        )
    threshold = min(max(int(val_fraction * HASHES), smallest + 1), largest)

    def side(validation: bool) -> Pairs:
        return lambda: (
            pair for pair in read_pairs_with_files(folder) if (hash_text(pair[0]) < threshold) == validation
        )

    return side(validation=False), side(validation=True)


def split_by_files(folder: Path, val_folder: Path) -> tuple[Pairs, Pairs]:
    """Return (training pairs without the source texts of validation pairs, validation pairs)."""

    def training() -> Iterator[tuple[str, str, str]]:
        # In memory, because validation sets are small
        held_out = {hash_text(source) for source, _ in read_pairs(val_folder)}
        return (pair for pair in read_pairs_with_files(folder) if hash_text(pair[0]) not in held_out)

    return training, lambda: read_pairs_with_files(val_folder)


def encode_side(
    folder: Path,
    pairs: Iterator[tuple[str, str, str]],
    template: PairTemplate,
    tokenizer: PreTrainedTokenizerFast,
    context: int,
    name: str,
) -> dict[str, int]:
    """Write one side of the split as a PairFile to `folder`, named train or val; val keeps its references.

    Returns:
        pairs; targets: tokens of the responses; bytes: UTF-8 bytes of the responses; shortened: pairs with a truncated
        source; too_long: skipped pairs.

    Raises:
        InputError: no pair fits in the context.
    """
    counts = {"bytes": 0, "shortened": 0, "too_long": 0}
    progress = Phase(f"prepare {name}: {folder.name} tokens", unit="pairs")
    with progress, PairFileWriter(folder, len(tokenizer)) as writer:
        while chunk := list(islice(pairs, CHUNK)):
            encoded = encode_pairs([pair[:2] for pair in chunk], template, tokenizer, context)
            for (source, target, file), tokens in zip(chunk, encoded, strict=True):
                if tokens is None:
                    counts["too_long"] += 1
                    continue
                reference = {"source": source, "reference": target} if folder.name == "val" else None
                number, group = writer.pairs + counts["too_long"], group_number(source, file)
                writer.add(number, tokens.prompt, tokens.response, reference, group)
                counts["shortened"] += tokens.shortened
                counts["bytes"] += len(template.render_response(target).encode())
            progress.advance(len(chunk))
    counts |= {"pairs": writer.pairs, "targets": writer.response_tokens}
    _check_side(counts, name, SIDES[folder.name], context)
    return counts


def _check_side(counts: dict[str, int], name: str, side: str, context: int) -> None:
    """Raise an InputError for a side without pairs."""
    if counts["pairs"] == 0 and counts["too_long"]:
        raise InputError(
            f"data={name}: none of the {counts['too_long']} {side} pairs fits in context={context}; "
            "their targets alone are longer.\nRaise context, or give pairs with shorter targets."
        )
    if counts["pairs"] == 0:
        raise InputError(
            f"data={name}: no {side} pair is left, because every source text is also in a validation pair.\n"
            "Give other validation pairs: val_path=FILE"
        )


def warn_of_truncation(folder: Path, name: str, context: int) -> None:
    """Log once per process how many pairs of a prepared `folder` were skipped or truncated."""
    for folder_name, side in SIDES.items():
        counts = read_ledger(folder)[folder_name]
        if counts["too_long"] or counts["shortened"]:
            warn_once(
                f"data={name}, context={context}: of {counts['pairs'] + counts['too_long']} {side} pairs "
                f"{counts['too_long']} are skipped (target too long) and {counts['shortened']} have a truncated source"
            )
