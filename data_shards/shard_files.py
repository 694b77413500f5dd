"""The encoded bytes of samples, out of their shards, each checked."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np

from data_shards.errors import DamagedShard, UserError
from data_shards.manifest import Shard, ShardSet
from data_shards.stores.cache import ChunkReader
from data_shards.tarfiles import BLOCK, parse_header


class ShardFiles:
    """Reads samples of a set, straight from a folder or through the cache of chunks."""

    def __init__(self, shard_set: ShardSet) -> None:
        self.shard_set, self.shards = shard_set, shard_set.manifest.shards
        self.reader = ChunkReader(shard_set.store)

    def __enter__(self) -> ShardFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.close()

    def read(self, ids: np.ndarray) -> list[bytes]:
        """The encoded bytes of those samples, whose CRC is checked.

        Raises `DamagedShard` naming shard and byte if they are not those of the manifest.
        """
        samples = self.shard_set.samples
        columns = [samples[name][ids].tolist() for name in ("offset", "size", "crc32")]
        shards = self.shard_set.shards_of(ids).tolist()
        return [self._read(*row) for row in zip(ids.tolist(), shards, *columns, strict=True)]

    def prefetch(self, ids: np.ndarray) -> None:
        """Begins to fetch what `read` will want of those samples, in that order; nothing for a folder on this machine."""
        if self.shard_set.store.local is not None:
            return
        offsets, shards = self.shard_set.samples["offset"][ids].astype(np.int64), self.shard_set.shards_of(ids)
        chunks = np.stack([shards, offsets // self.reader.chunk_bytes], 1)
        _, first = np.unique(chunks, axis=0, return_index=True)
        self.reader.prefetch(self._ranges(ids[np.sort(first)]))

    def _ranges(self, ids: np.ndarray) -> Iterable[tuple[str, str, int, int, int]]:
        columns = (self.shard_set.samples[name][ids].tolist() for name in ("offset", "size"))
        for number, offset, size in zip(self.shard_set.shards_of(ids).tolist(), *columns, strict=True):
            shard = self.shards[number]
            yield shard.name, shard.sha256, shard.size, offset, offset + size

    def _read(self, index: int, number: int, offset: int, size: int, crc32: int) -> bytes:
        shard = self.shards[number]
        data = self.reader.read(shard.name, shard.sha256, shard.size, offset, offset + size)
        if zlib.crc32(data) != crc32:
            # What lies in the cache may have been damaged there: once more from the set itself.
            self.reader.forget(shard.sha256, offset, offset + size)
            data = self.reader.read(shard.name, shard.sha256, shard.size, offset, offset + size)
        if zlib.crc32(data) != crc32:
            raise self.damaged(index, self._difference(index, shard, offset, size))
        return data

    def damaged(self, index: int, reason: str) -> DamagedShard:
        """The error for a sample whose bytes are not what they should be."""
        shard = self.shards[int(self.shard_set.shards_of(np.array(index)))]
        return DamagedShard(
            f"shard {self.shard_set.store.where(shard.name)} is damaged at byte {self.shard_set.samples['offset'][index]}:"
            f" {reason}; fetch or pack the set again"
        )

    def _difference(self, index: int, shard: Shard, offset: int, size: int) -> str:
        """Why bytes are not the manifest's: another member, or the right one with other bytes."""
        suffix = self.shard_set.manifest.suffixes[self.shard_set.samples["suffix"][index]]
        name = f"{self.shard_set.samples['key'][index].decode()}.{suffix}"
        try:
            begin = max(0, offset - BLOCK)
            found, length, _ = parse_header(self.reader.read(shard.name, shard.sha256, shard.size, begin, offset))
        except (UserError, ValueError):
            found, length = name, size
        if (found, length) != (name, size):
            return f"it holds {found[:80]!r} of {length} bytes, not {name!r} of {size}"
        return f"the bytes of {name!r} do not have the checksum of the manifest"
