"""Where the recipe's sets lie, and what pretraining reads of them."""

from __future__ import annotations

import functools
from pathlib import Path

from data_shards import Part, ShardSet, class_parts, open_set
from training.config import content_id
from training.recipe import DataConfig


@functools.lru_cache(maxsize=64)
def open_cached(place: str) -> ShardSet:
    """A set, opened once in each process."""
    return open_set(place)


def set_place(data: DataConfig, name: str) -> str:
    """The absolute path or the URL of a set that the recipe names: a URL, a path, or a folder below ``data.root``."""
    if "://" in name:
        return name
    if "://" in data.root and not Path(name).is_absolute():
        return f"{data.root.rstrip('/')}/{name}"
    return str((Path(data.root) / name).resolve())


def source_sets(data: DataConfig) -> list[str]:
    """The names of the sets that pretraining reads."""
    return [data.source, *data.mix]


def source_parts(data: DataConfig, source: ShardSet) -> list[Part]:
    """What pretraining mixes: the source set, by class if the recipe weighs its classes, and the sets of ``data.mix``.

    Raises:
        UserError: for an unknown class, a weight that is not positive, or a set that cannot be opened.
    """
    parts = [Part(source)]
    if data.class_weights != "natural":
        parts = class_parts(source, None if data.class_weights == "balanced" else data.class_weights)
        whole = sum(part.weight for part in parts)  # together the classes weigh what the set would
        parts = [Part(part.shard_set, part.weight / whole, part.split, part.subset) for part in parts]
    return parts + [Part(open_cached(set_place(data, name)), weight) for name, weight in data.mix.items()]


def source_id(data: DataConfig, source: ShardSet) -> str:
    """Identifies the images that pretraining reads, wherever they lie."""
    if not data.mix:
        return source.manifest.sha256
    return content_id(source.manifest.sha256, *(open_cached(set_place(data, name)).manifest.sha256 for name in data.mix))
