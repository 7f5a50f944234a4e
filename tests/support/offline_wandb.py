"""Reader of W&B's offline run files: LevelDB's log format, 7 bytes of header, then protocol buffers.

https://github.com/google/leveldb/blob/main/doc/log_format.md
"""

import struct
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER, PIECE = 32_768, 7, 7  # bytes; PIECE: checksum, length and kind before each piece of a record
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def runs_in(run_dir: Path) -> list[Any]:
    """Return the run (`run_id`, `run_group`, `display_name`, …) of every offline folder in a run directory."""
    files = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
    return [record.run for file in files for record in records(file) if record.HasField("run")]


def records(file: Path) -> list[Any]:
    """Return all whole records, the newest last."""
    data, found, parts, at = file.read_bytes(), [], b"", HEADER
    assert data.startswith(b":W&B")
    while at + PIECE <= len(data):
        if BLOCK - at % BLOCK < PIECE:  # too short for a piece: filled with zeros
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts = (b"" if kind in (WHOLE, FIRST) else parts) + data[at + PIECE : at + PIECE + length]
        at += PIECE + length
        if kind in (WHOLE, LAST):
            found.append(Record.FromString(parts))
    return found
