"""Images to shards, shards to batches: exact, elastic, resumable order on plain WebDataset tars.

Knows nothing of training or of clusters; the only place for webdataset.
"""

from data_shards.datasets import DATASETS, fetch
from data_shards.errors import BadImage, DamagedShard, UserError
from data_shards.index import index_tars
from data_shards.manifest import ShardSet, info, open_set, verify
from data_shards.pack import pack_arrays, pack_images, pack_source
from data_shards.reader import Batch, batches, episode, load_images
from data_shards.sources.made import Sample

__all__ = [
    "DATASETS",
    "BadImage",
    "Batch",
    "DamagedShard",
    "Sample",
    "ShardSet",
    "UserError",
    "batches",
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
