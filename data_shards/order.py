"""The order of samples: pure functions of (seed, pass, samples per shard), with no state and no I/O.

The clock is the number of images seen, p. A split of N samples is read in passes; position p lies in pass q = p // N at
j = p % N. In pass q:

1. the shards are permuted by (seed, q) and their samples concatenated;
2. the concatenation is cut into C contiguous streams, the first N mod C of them one sample longer;
3. within a stream, samples are shuffled inside consecutive blocks of `window` samples, whose offset is drawn per pass,
   so that any position is computed without walking to it;
4. position j is what stream j mod C holds at depth j // C.

Each pass therefore holds every sample exactly once, and a batch is a slice of positions, whatever the number of ranks
and workers; there is no remainder, because a batch may end one pass and begin the next. Rank r of W takes the entries k
of the global batch with k mod W == r; as W divides C and every batch starts at a multiple of W, a rank reads whole
streams during a pass, which is about 1/W of the set.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from data_shards.errors import UserError

STREAMS = 24
WINDOW = 1024

_SHARDS, _OFFSET, _BLOCK = 0, 1, 2  # what a draw is for, so that no two draws share a key


@dataclass(frozen=True, eq=False)
class Order:
    """What the order depends on: sample ids grouped by shard, seed, number of streams, window in samples."""

    ids: np.ndarray  # int64 (N,)
    starts: np.ndarray  # int64 (S + 1,): shard s holds ids[starts[s]:starts[s + 1]]
    seed: int
    streams: int = STREAMS
    window: int = WINDOW


def make_order(
    ids: np.ndarray, shards: np.ndarray, seed: int, *, streams: int = STREAMS, window: int = WINDOW
) -> Order:
    """Makes the order of the samples `ids` (N,), where sample `ids[i]` lies in shard `shards[i]` (non-decreasing).

    Raises `UserError` if there is no sample, or if seed < 0, streams < 1 or window < 1.
    """
    if len(ids) == 0:
        raise UserError("there is no sample to read; choose a split or a class that has some")
    if seed < 0 or streams < 1 or window < 1:
        raise UserError(f"seed {seed} must be >= 0, and streams {streams} and window {window} must be >= 1")
    shards = np.asarray(shards, dtype=np.int64)
    assert len(shards) == len(ids) and (np.diff(shards) >= 0).all(), "ids must be grouped by shard"
    starts = np.flatnonzero(np.diff(shards, prepend=-1))
    return Order(np.asarray(ids, np.int64), np.append(starts, len(ids)), int(seed), int(streams), int(window))


def check_world(batch: int, world: int, streams: int = STREAMS, rank: int = 0) -> None:
    """Raises `UserError` with the remedy unless `world` ranks can share batches of `batch` images over `streams`."""
    if batch < 1 or world < 1 or not 0 <= rank < world:
        raise UserError(f"batch {batch} and world {world} must be >= 1 and rank {rank} must lie in 0..world-1")
    if streams % world or batch % world:
        fits = ", ".join(map(str, worlds(batch, streams)))
        raise UserError(
            f"{world} workers cannot share batches of {batch} images over {streams} streams: the number of workers must"
            f" divide both; use one of {fits} workers, or change the batch or the streams"
        )


def worlds(batch: int, streams: int = STREAMS) -> list[int]:
    """The world sizes that a global batch of `batch` images over `streams` streams can use, ascending."""
    return [world for world in range(1, min(batch, streams) + 1) if streams % world == 0 and batch % world == 0]


def position(images_seen: int, samples: int) -> dict[str, int]:
    """The resume state of a split of `samples` samples: {"pass": passes completed, "samples": consumed in this one}."""
    return {"pass": images_seen // samples, "samples": images_seen % samples}


def sample_indices(order: Order, images_seen: int, batch: int, rank: int = 0, world: int = 1) -> np.ndarray:
    """Returns the sample ids, int64 (batch / world,), of a rank's part of the global batch after `images_seen` images.

    Raises `UserError` if `world` does not divide batch and streams, or images_seen < 0.
    """
    check_world(batch, world, order.streams, rank)
    if images_seen < 0:
        raise UserError(f"images_seen {images_seen} must be >= 0")
    positions = np.arange(images_seen + rank, images_seen + batch, world, dtype=np.int64)
    passes, within = np.divmod(positions, len(order.ids))
    result = np.empty(len(positions), np.int64)
    for number in np.unique(passes):
        mask = passes == number
        result[mask] = _ids_at(_plan(order, int(number)), within[mask])
    return result


@dataclass(frozen=True, eq=False)
class _Pass:
    """One pass: the permuted shards, where each ends in the concatenation, and what was last drawn for each stream."""

    order: Order
    number: int
    shards: np.ndarray
    ends: np.ndarray
    blocks: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict)
    offsets: dict[int, int] = field(default_factory=dict)


@lru_cache(maxsize=8)
def _plan(order: Order, number: int) -> _Pass:
    shards = _permutation(len(order.starts) - 1, (order.seed, _SHARDS, number))
    return _Pass(order, number, shards, np.cumsum(np.diff(order.starts)[shards]))


def _ids_at(plan: _Pass, within: np.ndarray) -> np.ndarray:
    """Sample ids at the positions `within` (0 <= j < N) of a pass."""
    order, count = plan.order, len(plan.order.ids)
    depth, stream = np.divmod(within, order.streams)
    begin = stream * (count // order.streams) + np.minimum(stream, count % order.streams)
    length = count // order.streams + (stream < count % order.streams)
    shuffled = [
        _shuffled_depth(plan, *key) for key in zip(stream.tolist(), depth.tolist(), length.tolist(), strict=True)
    ]
    flat = begin + np.array(shuffled, np.int64)
    slot = np.searchsorted(plan.ends, flat, side="right")
    shard = plan.shards[slot]
    ids: np.ndarray = order.ids[order.starts[shard + 1] - (plan.ends[slot] - flat)]
    return ids


def _shuffled_depth(plan: _Pass, stream: int, depth: int, length: int) -> int:
    order, window = plan.order, plan.order.window
    if stream not in plan.offsets:
        draw = int(_raw(1, (order.seed, _OFFSET, plan.number, stream))[0])
        plan.offsets[stream] = draw % window if length > window else 0
    offset = plan.offsets[stream]
    block = (depth + window - offset) // window
    low = max(0, offset + (block - 1) * window)
    if plan.blocks.get(stream, (-1,))[0] != block:
        size = min(length, offset + block * window) - low
        plan.blocks[stream] = block, _permutation(size, (order.seed, _BLOCK, plan.number, stream, block))
    return low + int(plan.blocks[stream][1][depth - low])


def _permutation(count: int, key: Iterable[int]) -> np.ndarray:
    return np.argsort(_raw(count, key), kind="stable")


def _raw(count: int, key: Iterable[int]) -> np.ndarray:
    # numpy promises that a bit generator's raw stream never changes; of Generator.permutation it does not.
    return np.random.PCG64(np.random.SeedSequence(tuple(key))).random_raw(count)
