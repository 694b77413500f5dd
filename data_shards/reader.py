"""Shards to batches, through webdataset, in the order that `order.py` defines.

webdataset gets a source of raw samples and explicit stages; its URL opener, its splitters and its default decoder are
not used, because they run commands and pickles out of shards and drop samples without a word.
"""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import get_worker_info

from data_shards.errors import BadImage, UserError
from data_shards.images import decode_image
from data_shards.manifest import ShardSet
from data_shards.order import STREAMS, WINDOW, Order, check_world, make_order, sample_indices
from data_shards.tarfiles import BLOCK, damaged, parse_header

MAX_OPEN_FILES = 128
CACHE_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch; `images_seen` is the global clock after the whole batch."""

    images: torch.Tensor  # uint8 (b, C, H, W), 0..255
    labels: torch.Tensor  # int64 (b,), -1 where there is none
    keys: list[str]
    images_seen: int


def batches(
    shard_set: ShardSet,
    *,
    batch: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    images_seen: int = 0,
    workers: int = 0,
    streams: int = STREAMS,
    window: int = WINDOW,
    split: str = "train",
    subset: np.ndarray | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Iterator[Batch]:
    """Yields this rank's batches without end, beginning after `images_seen` images.

    `batch` is the global batch in images; each Batch holds batch / world of them. The global sequence depends on
    (seed, streams, window, split, subset) and on nothing else: not on `world`, not on `workers` (loader processes;
    0 reads in this one). `subset` keeps only those sample ids, such as a support set. Images decoded once are kept in
    memory if all of them fit in `cache_bytes` (per rank, over its workers together).

    Raises `UserError` at once if world does not divide batch and streams or the split is empty, and `DamagedShard`
    naming shard and byte when bytes read are not those of the manifest.
    """
    check_world(batch, world, streams, rank)
    if workers < 0 or images_seen < 0:
        raise UserError(f"workers {workers} and images_seen {images_seen} must be >= 0")
    ids = _chosen(shard_set, split, subset)
    order = make_order(ids, shard_set.shards_of(ids), seed, streams=streams, window=window)
    per_process = cache_bytes // max(1, workers)
    fits = len(ids) * int(np.prod(shard_set.manifest.image_shape)) <= per_process
    pipeline = wds.DataPipeline(
        partial(_raw_samples, shard_set, order, images_seen, batch, rank, world, {} if fits else None),
        wds.map(partial(_decode, shard_set)),
        partial(_collate, images_seen, batch, world),
        _errors_as_items,
    )
    loader = wds.WebLoader(
        pipeline,
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        # Its own generator: the default draws from torch's global one and so would change the training's noise.
        generator=torch.Generator().manual_seed(0),
    )
    return _raised(iter(loader))


def load_images(shard_set: ShardSet, indices: Iterable[int] | np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads the samples with those ids; returns images uint8 (n, C, H, W), 0..255, and labels int64 (n,).

    Raises `UserError` for an id outside the set and `DamagedShard` naming shard and byte.
    """
    ids = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices), np.int64).reshape(-1)
    if len(ids) and not (ids.min() >= 0 and ids.max() < len(shard_set)):
        raise UserError(f"sample ids {ids.min()}..{ids.max()} must lie in 0..{len(shard_set) - 1}")
    images = np.empty((len(ids), *shard_set.manifest.image_shape), np.uint8)
    # In the order of the files, not of the caller: a set of any size is then read in one sweep.
    places = np.argsort(ids, kind="stable")
    for place, sample in zip(places, read_samples(shard_set, ids[places]), strict=True):
        images[place] = _decode(shard_set, sample)["image"]
    return torch.from_numpy(images), torch.from_numpy(shard_set.samples["label"][ids].astype(np.int64))


def episode(
    shard_set: ShardSet, *, label: int | str | None, shots: int, queries: int, seed: int, split: str = "train"
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a support set of `shots` and a query set of `queries` sample ids, disjoint, from one class (None: any).

    The same arguments give the same episode. Raises `UserError` if the class has fewer than shots + queries images.
    """
    ids = shard_set.indices(split, label)
    if shots < 0 or queries < 0 or seed < 0:
        raise UserError(f"shots {shots}, queries {queries} and seed {seed} must be >= 0")
    if shots + queries > len(ids):
        raise UserError(
            f"{shots} shots and {queries} queries need {shots + queries} images, and {shard_set.manifest.name} has"
            f" {len(ids)} of {'any class' if label is None else f'class {label!r}'} in its split {split}; ask for fewer"
        )
    key = (seed, 0 if label is None else 1 + shard_set.label_index(label))
    shuffled = ids[np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(len(ids)), kind="stable")]
    return shuffled[:shots], shuffled[shots : shots + queries]


def read_samples(shard_set: ShardSet, ids: np.ndarray) -> Iterator[dict[str, Any]]:
    """Yields one raw sample per id, in that order: {"__key__", "index", "label", "where", "bytes"}.

    Every range is checked: the tar header before it names this key and size, and the bytes have their CRC.
    """
    with _OpenFiles(shard_set) as files:
        yield from files.samples(ids)


class _OpenFiles:
    """At most `MAX_OPEN_FILES` shard files, opened when first read."""

    def __init__(self, shard_set: ShardSet) -> None:
        self.shard_set = shard_set
        self.descriptors: OrderedDict[int, int] = OrderedDict()

    def __enter__(self) -> _OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        while self.descriptors:
            os.close(self.descriptors.popitem()[1])

    def samples(self, ids: np.ndarray) -> Iterator[dict[str, Any]]:
        columns = [self.shard_set.samples[name][ids].tolist() for name in ("offset", "size", "crc32", "label", "suffix", "key")]
        suffixes = self.shard_set.manifest.suffixes
        shards = self.shard_set.shards_of(ids).tolist()
        for index, shard, offset, size, crc32, label, suffix, key in zip(ids.tolist(), shards, *columns, strict=True):
            data = self._read(shard, offset, size, crc32, f"{key.decode()}.{suffixes[suffix]}")
            yield {"__key__": key.decode(), "index": index, "label": label, "where": (shard, offset), "bytes": data}

    def _read(self, shard: int, offset: int, size: int, crc32: int, name: str) -> bytes:
        path = self.shard_set.shard_path(shard)
        try:
            block = os.pread(self._descriptor(shard), BLOCK + size, offset - BLOCK)
        except OSError as error:
            raise damaged(path, offset, f"it cannot be read ({error.strerror})") from None
        try:
            found = parse_header(block[:BLOCK])
        except ValueError as error:
            raise damaged(path, offset - BLOCK, str(error)) from None
        if found != (name, size, "0"):
            reason = f"it holds {found[0][:80]!r} of {found[1]} bytes, not {name!r} of {size}"
            raise damaged(path, offset - BLOCK, reason)
        data = block[BLOCK:]
        if len(data) != size or zlib.crc32(data) != crc32:
            raise damaged(path, offset, f"the bytes of {name!r} do not have the checksum of the manifest")
        return data

    def _descriptor(self, shard: int) -> int:
        if shard not in self.descriptors:
            if len(self.descriptors) >= MAX_OPEN_FILES:
                os.close(self.descriptors.popitem(last=False)[1])
            self.descriptors[shard] = os.open(self.shard_set.shard_path(shard), os.O_RDONLY | os.O_NONBLOCK)
        self.descriptors.move_to_end(shard)
        return self.descriptors[shard]


def _chosen(shard_set: ShardSet, split: str, subset: np.ndarray | None) -> np.ndarray:
    ids = shard_set.indices(split)
    if subset is not None:
        subset = np.asarray(subset, np.int64)
        if not np.isin(subset, ids).all():
            raise UserError(f"the subset holds sample ids that are not in split {split!r} of {shard_set.manifest.name}")
        ids = np.unique(subset)
    if len(ids) == 0:
        raise UserError(f"split {split!r} of {shard_set.manifest.name} holds no image; choose another or pack it again")
    return ids


def _raw_samples(
    shard_set: ShardSet,
    order: Order,
    images_seen: int,
    batch: int,
    rank: int,
    world: int,
    cache: dict[int, dict[str, Any]] | None,
) -> Iterator[dict[str, Any]]:
    """The source: worker w of n makes the whole batches w, w + n, ..., which the loader takes in turn."""
    worker = get_worker_info()
    first, step = (worker.id, worker.num_workers) if worker else (0, 1)
    with _OpenFiles(shard_set) as files:
        for number in count(first, step):
            ids = sample_indices(order, images_seen + number * batch, batch, rank, world)
            if cache is None:
                yield from files.samples(ids)
                continue
            missing = np.unique([index for index in ids.tolist() if index not in cache])
            cache.update((sample["index"], sample) for sample in files.samples(missing.astype(np.int64)))
            for index in ids.tolist():
                yield cache[index]


def _decode(shard_set: ShardSet, sample: dict[str, Any]) -> dict[str, Any]:
    """Replaces a raw sample's bytes by "image", uint8 (C, H, W), in place, so that a cached sample is decoded once."""
    if "image" not in sample:
        shape = shard_set.manifest.image_shape
        shard, offset = sample["where"]
        try:
            image = decode_image(sample["bytes"], shape[0])
        except BadImage as error:
            raise damaged(shard_set.shard_path(shard), offset, f"{sample['__key__']!r}: {error}") from None
        if image.shape != shape:
            reason = f"{sample['__key__']!r} has the shape {image.shape}, not {shape}"
            raise damaged(shard_set.shard_path(shard), offset, reason)
        sample["image"] = image
        del sample["bytes"]
    return sample


def _collate(images_seen: int, batch: int, world: int, samples: Iterable[dict[str, Any]]) -> Iterator[Batch]:
    worker = get_worker_info()
    first, step = (worker.id, worker.num_workers) if worker else (0, 1)
    stream = iter(samples)
    for number in count(first, step):
        group = [next(stream) for _ in range(batch // world)]
        yield Batch(
            images=torch.from_numpy(np.stack([sample["image"] for sample in group])),
            labels=torch.tensor([sample["label"] for sample in group], dtype=torch.int64),
            keys=[sample["__key__"] for sample in group],
            images_seen=images_seen + (number + 1) * batch,
        )


def _errors_as_items(items: Iterable[Batch]) -> Iterator[Batch | UserError]:
    # The loader would turn an error raised in a worker process into a page of traceback.
    try:
        yield from items
    except UserError as error:
        yield error


def _raised(items: Iterator[Batch | UserError]) -> Iterator[Batch]:
    for item in items:
        if isinstance(item, UserError):
            raise item
        yield item


def _unchanged(item: Batch | UserError) -> Batch | UserError:
    return item
