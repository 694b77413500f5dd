"""The record of one shard: the rows of its samples, what was left out, and the hash of its file."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from data_shards.manifest import COLUMNS

# What a set's table has, and: the item's index in its source, the hash of its bytes, its perceptual hash, and whether it
# was taken out again, being a copy.
EXTRA: dict[str, str] = {"index": "<i8", "hash": "<u8", "near": "<u8", "dropped": "|b1"}


class Written(Protocol):
    """A written file."""

    @property
    def size(self) -> int: ...
    @property
    def hash(self) -> Any: ...


@dataclass(frozen=True)
class Record:
    """What is known of a finished shard. Columns have one row per sample, (n,), `hash` (n, 2)."""

    columns: dict[str, np.ndarray]
    bad: tuple[tuple[str, str], ...]
    name: str = ""  # of the tar, "" if it has no samples
    size: int = 0  # bytes
    sha256: str = ""

    @property
    def rows(self) -> int:
        return len(self.columns["index"])

    @property
    def kept(self) -> np.ndarray:
        """bool (n,): the samples that are in the tar."""
        return ~self.columns["dropped"]

    @staticmethod
    def of(
        rows: Sequence[tuple[Any, ...]], hashes: Sequence[bytes], near: np.ndarray, bad: tuple[tuple[str, str], ...]
    ) -> Record:
        """The record of samples: `rows` hold the values of `COLUMNS` and the index, `hashes` 16 bytes each."""
        names = (*COLUMNS, "index")
        values = list(zip(*rows, strict=True)) if rows else [()] * len(names)
        kinds = {**COLUMNS, **EXTRA}
        columns = {
            name: np.array(column, "S" if name == "key" and rows else "S1" if name == "key" else kinds[name])
            for name, column in zip(names, values, strict=True)
        }
        columns["hash"] = np.frombuffer(b"".join(hashes), "<u8").reshape(-1, 2)
        return Record({**columns, "near": near, "dropped": np.zeros(len(rows), bool)}, bad)

    def in_tar(self, name: str, written: Written) -> Record:
        """The same with its tar's name, size and sha256."""
        return replace(self, name=name, size=written.size, sha256=written.hash.hexdigest())

    def to_bytes(self) -> bytes:
        buffer = io.BytesIO()
        about = {"bad": self.bad, "name": self.name, "size": self.size, "sha256": self.sha256}
        about_bytes = np.frombuffer(json.dumps(about).encode(), np.uint8)
        np.savez(buffer, about=about_bytes, **self.columns)  # type: ignore[arg-type]
        return buffer.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> Record:
        """Raises `ValueError` or `KeyError` for anything else."""
        with np.load(io.BytesIO(data), allow_pickle=False) as found:
            about = json.loads(found["about"].tobytes())
            columns = {name: found[name] for name in (*COLUMNS, *EXTRA)}
        bad = tuple((str(name), str(reason)) for name, reason in about["bad"])
        return Record(columns, bad, str(about["name"]), int(about["size"]), str(about["sha256"]))
