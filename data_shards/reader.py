"""Shards to batches, through webdataset, in the order that `order.py` defines.

webdataset gets a source and explicit stages; its URL opener, its splitters and its default decoder are
not used, because they run commands and pickles out of shards and drop samples without a word.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import get_worker_info

from data_shards.errors import BadImage, UserError
from data_shards.images import decode_into
from data_shards.manifest import ShardSet
from data_shards.order import STREAMS, WINDOW, Mixture, check_world, locate, make_order, mix, positions
from data_shards.parts import Part, check_shapes, chosen_ids, distinct_sets, gather, labels_of, set_numbers
from data_shards.shard_files import ShardFiles

CACHE_BYTES = 256 * 1024 * 1024
AHEAD = 2  # batches that each worker may be ahead
GROUP = 1024  # samples whose places are looked up at once


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch; `images_seen` is the global clock after the whole batch."""

    images: torch.Tensor  # uint8 (b, C, H, W), 0..255
    labels: torch.Tensor  # int64 (b,), -1 where there is none; index into `class_names`
    parts: torch.Tensor  # int64 (b,), which of the mixed parts each image is from
    names: np.ndarray  # bytes (b,), the keys
    images_seen: int

    @property
    def keys(self) -> list[str]:
        return [name.decode() for name in self.names.tolist()]


def batches(
    source: ShardSet | Sequence[Part],
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
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Yields this rank's batches without end, beginning after `images_seen` images.

    `batch` is the global batch in images; each Batch holds batch / world of them. The global sequence depends on
    (seed, streams, window, and each part's set, split, subset and weight) and on nothing else: not on `world`, not on
    `workers` (loader processes; 0 reads in this one). `source` is a set, of which `subset` keeps only those sample ids,
    or parts that are mixed by weight. Images decoded once are kept in memory if all of them fit in `cache_bytes` (per
    rank, shared by its workers). `pin_memory` readies batches for a GPU.

    Raises `UserError` at once if world does not divide batch and streams, a split is empty or parts differ in shape, and
    `DamagedShard` naming shard and byte when bytes read are not those of the manifest.
    """
    check_world(batch, world, streams, rank)
    if workers < 0 or images_seen < 0:
        raise UserError(f"workers {workers} and images_seen {images_seen} must be >= 0")
    parts = [Part(source, split=split, subset=subset)] if isinstance(source, ShardSet) else list(source)
    check_shapes(parts)
    orders = [
        make_order(chosen_ids(part), part.shard_set.bounds, seed, streams=streams, window=window) for part in parts
    ]
    shape = parts[0].shard_set.manifest.image_shape
    total = sum(len(order.ids) for order in orders)
    cached = total * int(np.prod(shape)) <= cache_bytes
    kept = _Kept(total if cached else (AHEAD + 1) * max(1, workers) * batch // world, shape, cached)
    feed = _Feed(parts, mix(orders, [part.weight for part in parts]), images_seen, batch, rank, world)
    pipeline = wds.DataPipeline(
        partial(_batches, feed, kept),
        _errors_as_items,
    )
    loader = wds.WebLoader(
        pipeline,
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        prefetch_factor=AHEAD if workers else None,
        # What is kept is memory that a fork shares.
        multiprocessing_context="fork" if workers else None,
        # Its own generator: the default draws from torch's global one and so would change the training's noise.
        generator=torch.Generator().manual_seed(0),
    )
    return _received(iter(loader), kept, pin_memory and torch.cuda.is_available())


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
    with ShardFiles(shard_set) as files:
        for begin in range(0, len(ids), GROUP):
            group = places[begin : begin + GROUP]
            for place, index, data in zip(group, ids[group].tolist(), files.read(ids[group]), strict=True):
                _decode(files, index, data, images[place])
    return torch.from_numpy(images), torch.from_numpy(shard_set.samples["label"][ids].astype(np.int64))


@dataclass(frozen=True, eq=False)
class _Feed:
    """All that decides which images a rank's batches hold."""

    parts: list[Part]
    mixture: Mixture
    images_seen: int
    batch: int
    rank: int
    world: int


class _Kept:
    """Decoded images in memory that forked workers share, so that no pixel goes through a pipe.

    Either all images that a feed may read, each decoded once (`cached`), or the batches under way: batch n lies where
    batch n - (AHEAD + 1) * workers lay. A worker never begins a batch AHEAD + 1 after one that was not taken yet, since
    the loader asks it for another only when it hands one over, and `_received` copies that before it asks for the next.
    """

    def __init__(self, count: int, shape: tuple[int, int, int], cached: bool) -> None:
        self.images = np.frombuffer(mmap.mmap(-1, count * int(np.prod(shape))), np.uint8).reshape(count, *shape)
        # Set after the image is whole. Two workers may decode the same one; both write the same bytes.
        self.filled = np.frombuffer(mmap.mmap(-1, count), np.uint8) if cached else None


@dataclass
class _Group:
    """Batches of one loader process, one after the other: for each image its part, its sample id and its place in `_Kept`."""

    numbers: range
    parts: np.ndarray
    ids: np.ndarray
    slots: np.ndarray


class _Travelling(NamedTuple):
    """A `Batch` on its way between processes: its images stay where `slots` says."""

    slots: np.ndarray
    labels: np.ndarray
    parts: np.ndarray
    names: np.ndarray
    images_seen: int


def _groups(feed: _Feed, kept: _Kept) -> Iterator[_Group]:
    """The batches of this loader process, some at once: worker w of n makes the batches w, w + n, ..., which the loader
    takes in turn.
    """
    worker = get_worker_info()
    first, step = (worker.id, worker.num_workers) if worker else (0, 1)
    orders, local = feed.mixture.orders, feed.batch // feed.world
    bases = np.cumsum([0, *(len(order.ids) for order in orders)])
    at_once = max(1, min(GROUP, int(bases[-1])) // local)
    for begin in count(first, step * at_once):
        numbers = range(begin, begin + step * at_once, step)
        where = [positions(feed.images_seen + n * feed.batch, feed.batch, feed.rank, feed.world) for n in numbers]
        parts, ids = locate(feed.mixture, np.concatenate(where))
        if kept.filled is None:
            slots = np.concatenate([np.arange(local) + n * local for n in numbers]) % len(kept.images)
        else:
            slots = np.empty(len(ids), np.int64)
            for part in np.unique(parts):
                mask = parts == part
                slots[mask] = bases[part] + np.searchsorted(orders[part].ids, ids[mask])
        yield _Group(numbers, parts, ids, slots)


def _batches(feed: _Feed, kept: _Kept) -> Iterator[_Travelling]:
    """The source: one batch after the other. While one group of batches is read, the next is being fetched."""
    files, of_set = [ShardFiles(one) for one in distinct_sets(feed.parts)], set_numbers(feed.parts)
    local = feed.batch // feed.world
    groups = _groups(feed, kept)
    coming = next(groups)
    try:
        while True:
            group, coming = coming, next(groups)
            wanted = _missing(kept, coming.slots)
            for number, one in enumerate(files):
                one.prefetch(coming.ids[wanted[of_set[coming.parts[wanted]] == number]])
            for place, number in enumerate(group.numbers):
                span = slice(place * local, (place + 1) * local)
                parts, ids, slots = group.parts[span], group.ids[span], group.slots[span]
                _fill(kept, files, of_set[parts], ids, slots)
                labels, names = labels_of(feed.parts, parts, ids), gather(feed.parts, parts, ids, "key")
                yield _Travelling(slots, labels, parts, names, feed.images_seen + (number + 1) * feed.batch)
    finally:
        for one in files:
            one.__exit__()


def _missing(kept: _Kept, slots: np.ndarray) -> np.ndarray:
    """Which entries have to be read: those whose image is not kept yet, each image once."""
    if kept.filled is None:
        return np.arange(len(slots))
    distinct, entries = np.unique(slots, return_index=True)
    return np.sort(entries[kept.filled[distinct] == 0])


def _fill(kept: _Kept, files: list[ShardFiles], from_set: np.ndarray, ids: np.ndarray, slots: np.ndarray) -> None:
    """Reads and decodes what is missing of a batch."""
    wanted = _missing(kept, slots)
    for number in np.unique(from_set[wanted]).tolist():
        entries = wanted[from_set[wanted] == number]
        found = zip(ids[entries].tolist(), slots[entries].tolist(), files[number].read(ids[entries]), strict=True)
        for index, slot, data in found:
            _decode(files[number], index, data, kept.images[slot])
            if kept.filled is not None:
                kept.filled[slot] = 1


def _decode(files: ShardFiles, index: int, data: bytes, out_CHW: np.ndarray) -> None:
    try:
        decode_into(out_CHW, data)
    except BadImage as error:
        key = files.shard_set.samples["key"][index].decode()
        raise files.damaged(index, f"{key!r}: {error}") from None


def _errors_as_items(items: Iterable[_Travelling]) -> Iterator[_Travelling | UserError]:
    # The loader would turn an error raised in a worker process into a page of traceback.
    try:
        yield from items
    except UserError as error:
        yield error


def _received(items: Iterator[_Travelling | UserError], kept: _Kept, pin_memory: bool) -> Iterator[Batch]:
    for item in items:
        if isinstance(item, UserError):
            raise item
        images = torch.from_numpy(kept.images[item.slots])
        yield Batch(
            images.pin_memory() if pin_memory else images,
            torch.from_numpy(item.labels),
            torch.from_numpy(item.parts),
            item.names,
            item.images_seen,
        )


def _unchanged(item: Any) -> Any:
    return item
