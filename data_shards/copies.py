"""A finished set to another place, as it is."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from data_shards.errors import DamagedShard, UserError
from data_shards.manifest import COLUMNS, MANIFEST, SAMPLES, Shard, ShardSet, open_set
from data_shards.stores import Store, open_store
from data_shards.stores.cache import cached_file

BESIDE = ("duplicates.csv", "near_duplicates.csv")


def copy_set(
    shard_set: ShardSet,
    place: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ShardSet:
    """Copies a set to a folder or an object store, byte by byte, the manifest last; `progress(done, total)` counts shards.

    Each shard is hashed on the way. Raises `UserError` if a set is there (without `overwrite`) or the place cannot be
    written, and `DamagedShard` naming a shard that is not the manifest's.
    """
    source, target = shard_set.store, open_store(place)
    if target.exists(MANIFEST):
        if not overwrite:
            raise UserError(f"{target.name} holds a set already; choose another place, or overwrite it with --overwrite")
        target.remove(MANIFEST)
    shards = shard_set.manifest.shards
    with tempfile.TemporaryDirectory() as scratch:
        for number, shard in enumerate(shards):
            file = _fetched(source, shard, Path(scratch) / "shard")
            target.put(file, shard.name)
            if progress:
                progress(number + 1, len(shards))
    for name in COLUMNS:
        path, column = f"{SAMPLES}/{name}.npy", shard_set.manifest.columns[name]
        target.put(cached_file(source, path, column.sha256, column.size), path)
    for name in (*BESIDE, MANIFEST):
        if source.exists(name):
            target.write(name, source.read(name))
    return open_set(place)


def _fetched(store: Store, shard: Shard, path: Path) -> Path:
    """A copy of a shard on this machine, which has the hash of the manifest."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for data in store.parts(shard.name, shard.size + 1):  # a byte more than there should be, to see that there is none
            digest.update(data)
            file.write(data)
    if digest.hexdigest() != shard.sha256:
        raise DamagedShard(
            f"shard {store.where(shard.name)} does not have the sha256 of its manifest; fetch or pack the set again"
        )
    return path
