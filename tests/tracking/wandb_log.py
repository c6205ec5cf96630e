"""Reads the history back from what W&B left on the disk."""

from __future__ import annotations

import json
import struct
import time
import zlib
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record


def starts(run_dir: Path) -> list[Path]:
    """The directory of each start, oldest first."""
    return sorted((run_dir / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime_ns)


def records(start: Path) -> list[Record]:
    """The whole records; none before W&B's own process has made the log, which can be after the run's end."""
    data = b"".join(log.read_bytes() for log in start.glob("*.wandb"))
    at, payload, found = 7, b"", []
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if at + 7 + length > len(data):
            break  # still being written
        payload += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            found.append(Record.FromString(payload))
            payload = b""
    return found


def wait_for_end(start: Path) -> None:
    """W&B's own process may still be writing for a moment after a run has ended."""
    for _ in range(1200):
        if any(record.HasField("exit") for record in records(start)):
            return
        time.sleep(0.05)
    raise AssertionError(f"{start} was never ended")


def history(start: Path) -> list[dict[str, Any]]:
    rows = [record.history for record in records(start) if record.HasField("history")]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in rows]


def log_of(payloads: list[bytes]) -> tuple[bytes, list[int]]:
    """A log as W&B writes it, and where each record ends in it."""
    data, ends = bytearray(b":W&B\xe1\xbe\x00"), []
    for payload in payloads:
        first, rest = True, payload
        while first or rest:
            room = 32768 - len(data) % 32768
            if room < 7:
                data += bytes(room)
                continue
            part, rest = rest[: room - 7], rest[room - 7 :]
            kind = (1 if first else 4) if not rest else (2 if first else 3)
            data += struct.pack("<IHB", zlib.crc32(part), len(part), kind) + part
            first = False
        ends.append(len(data))
    return bytes(data), ends
