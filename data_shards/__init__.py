"""Images to shards, shards to batches: exact, elastic, resumable order on plain WebDataset tars.

Knows nothing of training or of clusters; the only place for webdataset. What is named here is imported when it is first
used: listing a set needs neither torch nor webdataset.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_shards.copies import copy_set
    from data_shards.datasets import DATASETS, fetch
    from data_shards.episodes import episode
    from data_shards.errors import BadImage, DamagedShard, UserError
    from data_shards.index import index_tars
    from data_shards.manifest import ShardSet, info, open_set, verify
    from data_shards.pack import pack_arrays, pack_images, pack_source
    from data_shards.parts import Part, class_names, class_parts
    from data_shards.reader import Batch, batches, load_images
    from data_shards.sources.made import Sample

_HOMES = {
    "copies": ("copy_set",),
    "datasets": ("DATASETS", "fetch"),
    "episodes": ("episode",),
    "errors": ("BadImage", "DamagedShard", "UserError"),
    "index": ("index_tars",),
    "manifest": ("ShardSet", "info", "open_set", "verify"),
    "pack": ("pack_arrays", "pack_images", "pack_source"),
    "parts": ("Part", "class_names", "class_parts"),
    "reader": ("Batch", "batches", "load_images"),
    "sources.made": ("Sample",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "DATASETS",
    "BadImage",
    "Batch",
    "DamagedShard",
    "Part",
    "Sample",
    "ShardSet",
    "UserError",
    "batches",
    "class_names",
    "class_parts",
    "copy_set",
    "episode",
    "fetch",
    "index_tars",
    "info",
    "load_images",
    "open_set",
    "pack_arrays",
    "pack_images",
    "pack_source",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
