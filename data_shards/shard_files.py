"""The encoded bytes of samples, out of their shards, each checked."""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict

import numpy as np

from data_shards.manifest import ShardSet
from data_shards.tarfiles import BLOCK, damaged, parse_header

MAX_OPEN_FILES = 128


class ShardFiles:
    """At most `MAX_OPEN_FILES` shard files of a set, opened when first read."""

    def __init__(self, shard_set: ShardSet) -> None:
        self.shard_set = shard_set
        self.descriptors: OrderedDict[int, int] = OrderedDict()

    def __enter__(self) -> ShardFiles:
        return self

    def __exit__(self, *_: object) -> None:
        while self.descriptors:
            os.close(self.descriptors.popitem()[1])

    def read(self, ids: np.ndarray) -> list[bytes]:
        """The encoded bytes of those samples, whose CRC is checked."""
        samples = self.shard_set.samples
        columns = [samples[name][ids].tolist() for name in ("offset", "size", "crc32")]
        shards = self.shard_set.shards_of(ids).tolist()
        return [self._read(*row) for row in zip(ids.tolist(), shards, *columns, strict=True)]

    def _read(self, index: int, shard: int, offset: int, size: int, crc32: int) -> bytes:
        descriptor = self.descriptors.get(shard)
        try:
            data = os.pread(descriptor if descriptor is not None else self._open(shard), size, offset)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or "no such place"
            raise damaged(self.shard_set.shard_path(shard), offset, f"it cannot be read ({reason})") from None
        if len(data) != size or zlib.crc32(data) != crc32:
            raise damaged(self.shard_set.shard_path(shard), offset, self._difference(index, shard, offset, size))
        return data

    def _open(self, shard: int) -> int:
        if len(self.descriptors) >= MAX_OPEN_FILES:
            os.close(self.descriptors.popitem(last=False)[1])
        self.descriptors[shard] = os.open(self.shard_set.shard_path(shard), os.O_RDONLY | os.O_NONBLOCK)
        return self.descriptors[shard]

    def _difference(self, index: int, shard: int, offset: int, size: int) -> str:
        """Why bytes are not the manifest's: another member, or the right one with other bytes."""
        suffix = self.shard_set.manifest.suffixes[self.shard_set.samples["suffix"][index]]
        name = f"{self.shard_set.samples['key'][index].decode()}.{suffix}"
        try:
            found, length, _ = parse_header(os.pread(self.descriptors[shard], BLOCK, max(0, offset - BLOCK)))
        except (OSError, ValueError):
            found, length = name, size
        if (found, length) != (name, size):
            return f"it holds {found[:80]!r} of {length} bytes, not {name!r} of {size}"
        return f"the bytes of {name!r} do not have the checksum of the manifest"
