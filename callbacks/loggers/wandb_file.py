"""Reader of W&B's offline run files: LevelDB's log format, 7 bytes of header, then protocol buffers.

https://github.com/google/leveldb/blob/main/doc/log_format.md
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER, PIECE = 32_768, 7, 7  # bytes; PIECE: checksum, length and kind before each piece of a record
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_records(file: Path, last_blocks: int | None = None) -> Iterator[Any]:
    """Yield all whole records, the newest last; the file of a killed process may end within one.

    Args:
        last_blocks: read so many blocks from the end only.
    """
    data = file.read_bytes()
    skipped = 0 if last_blocks is None else max(0, len(data) // BLOCK - last_blocks) * BLOCK
    parts: bytes | None = None  # of the present record; none of one that begins in a skipped block
    at = max(skipped, HEADER)
    while data.startswith(b":W&B") and at + PIECE <= len(data):
        if BLOCK - at % BLOCK < PIECE:  # too short for a piece: filled with zeros
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        end = at + PIECE + length
        if kind not in (WHOLE, FIRST, MIDDLE, LAST) or end > len(data):
            return
        if kind in (WHOLE, FIRST):
            parts = b""
        if parts is not None:
            parts += data[at + PIECE : end]
        at = end
        if kind in (WHOLE, LAST) and parts is not None:
            try:
                yield Record.FromString(parts)
            except DecodeError:
                return


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows of the history, without W&B's own columns; a value with parts, such as an image, is one value."""
    rows = []
    for record in read_records(file):
        if not record.HasField("history"):
            continue
        row: dict[str, Any] = {}
        for item in record.history.item:
            *parents, name = [item.key] if item.key else item.nested_key
            place = row
            for parent in parents:
                place = place.setdefault(parent, {})
            place[name] = json.loads(item.value_json)
        rows.append({name: value for name, value in row.items() if not name.startswith("_")})
    return rows
