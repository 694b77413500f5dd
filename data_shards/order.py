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

Several orders are mixed by weight (`Mixture`): position p lies in lane p mod C at depth p // C; every T depths of a lane
hold each order a fixed number of times, in an order drawn per lane, and what a lane takes from an order is the stream of
the same number there. So shares are exact over every T * C images, each order is read exactly once per pass of its own,
and a rank still reads whole streams.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_shards.errors import UserError

STREAMS = 24
WINDOW = 1024
PERIOD = 1024

_SHARDS, _OFFSET, _BLOCK, _MIX = 0, 1, 2, 3  # what a draw is for, so that no two draws share a key
_BLOCKS_KEPT = 4  # drawn blocks kept for each stream


@dataclass(frozen=True, eq=False)
class Order:
    """What the order depends on: sample ids grouped by shard, seed, number of streams, window in samples."""

    ids: np.ndarray  # int64 (N,)
    starts: np.ndarray  # int64 (S + 1,): shard s holds ids[starts[s]:starts[s + 1]]
    seed: int
    streams: int = STREAMS
    window: int = WINDOW
    passes: dict[int, _Pass] = field(default_factory=dict, repr=False)  # the last passes asked for, as drawn


@dataclass(frozen=True, eq=False)
class Mixture:
    """Orders over one number of streams, and how many of every sum(slots) images of a lane each of them gives."""

    orders: tuple[Order, ...]
    slots: tuple[int, ...]


def make_order(
    ids: np.ndarray, bounds: np.ndarray, seed: int, *, streams: int = STREAMS, window: int = WINDOW
) -> Order:
    """Makes the order of the samples `ids` (N,), ascending, where shard s holds the ids bounds[s] to bounds[s + 1].

    Raises `UserError` if there is no sample, or if seed < 0, streams < 1 or window < 1.
    """
    if len(ids) == 0:
        raise UserError("there is no sample to read; choose a split or a class that has some")
    if seed < 0 or streams < 1 or window < 1:
        raise UserError(f"seed {seed} must be >= 0, and streams {streams} and window {window} must be >= 1")
    starts = np.unique(np.searchsorted(ids, bounds))  # shards without a chosen sample drop out
    assert starts[0] == 0 and starts[-1] == len(ids), "every id must lie in a shard"
    return Order(np.asarray(ids, np.int64), starts, int(seed), int(streams), int(window))


def mix(orders: Sequence[Order], weights: Sequence[float]) -> Mixture:
    """Mixes orders by weights > 0, which are rounded to whole slots of `PERIOD` (8 for each order if that is more), at
    least one each.

    Raises `UserError` for a weight that is not a positive number.
    """
    for weight in weights:
        if not (weight > 0 and np.isfinite(weight)):
            raise UserError(f"the sampling weight {weight} must be a number over 0; leave out what is not to be read")
    assert len(orders) == len(weights) and len({order.streams for order in orders}) == 1
    period = max(PERIOD, 8 * len(orders)) if len(orders) > 1 else 1
    exact = np.asarray(weights, np.float64) / sum(weights) * period
    slots = np.maximum(1, np.floor(exact).astype(np.int64))
    while (left := period - int(slots.sum())) != 0:  # largest remainder; surplus comes off the largest share
        slots[int(np.argmax(exact - slots if left > 0 else slots))] += 1 if left > 0 else -1
    return Mixture(tuple(orders), tuple(slots.tolist()))


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


def positions(images_seen: int, batch: int, rank: int = 0, world: int = 1) -> np.ndarray:
    """int64 (batch / world,): a rank's positions in the global batch that begins after `images_seen` images."""
    return np.arange(images_seen + rank, images_seen + batch, world, dtype=np.int64)


def sample_indices(order: Order, images_seen: int, batch: int, rank: int = 0, world: int = 1) -> np.ndarray:
    """Returns the sample ids, int64 (batch / world,), of a rank's part of the global batch after `images_seen` images.

    Raises `UserError` if `world` does not divide batch and streams, or images_seen < 0.
    """
    check_world(batch, world, order.streams, rank)
    if images_seen < 0:
        raise UserError(f"images_seen {images_seen} must be >= 0")
    return ids_at(order, positions(images_seen, batch, rank, world))


def ids_at(order: Order, where: np.ndarray) -> np.ndarray:
    """Sample ids at the positions `where`, int64 (n,), of the endless sequence of passes."""
    passes, within = np.divmod(where, len(order.ids))
    if len(where) and passes[0] == passes.max() == passes.min():
        return _in_pass(_pass(order, int(passes[0])), within)
    result = np.empty(len(where), np.int64)
    for number in np.unique(passes):
        mask = passes == number
        result[mask] = _in_pass(_pass(order, int(number)), within[mask])
    return result


def locate(mixture: Mixture, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(number of the order, sample id there), int64 (n,) each, at the positions `where` of a mixture."""
    if len(mixture.orders) == 1:
        return np.zeros(len(where), np.int64), ids_at(mixture.orders[0], where)
    streams, seed, period = mixture.orders[0].streams, mixture.orders[0].seed, sum(mixture.slots)
    slots = np.asarray(mixture.slots)
    pattern = np.repeat(np.arange(len(slots)), slots)
    depth, lane = np.divmod(where, streams)
    cycle, place = np.divmod(depth, period)
    parts, taken = np.empty(len(where), np.int64), np.empty(len(where), np.int64)
    for key in np.unique(np.stack([lane, cycle], 1), axis=0).tolist():
        mask = (lane == key[0]) & (cycle == key[1])
        drawn = pattern[_permutation(period, (seed, _MIX, *key))]
        # How often each slot's order has occurred before it in this cycle: its rank among equals, in order of place.
        by_part = np.argsort(drawn, kind="stable")
        before = np.empty(period, np.int64)
        before[by_part] = np.arange(period) - (np.cumsum(slots) - slots)[drawn[by_part]]
        parts[mask] = drawn[place[mask]]
        taken[mask] = key[1] * slots[parts[mask]] + before[place[mask]]
    inner, ids = taken * streams + lane, np.empty(len(where), np.int64)
    for part in np.unique(parts):
        mask = parts == part
        ids[mask] = ids_at(mixture.orders[part], inner[mask])
    return parts, ids


@dataclass(frozen=True, eq=False)
class _Pass:
    """One pass: the permuted shards, where each ends in the concatenation, where each stream's blocks begin."""

    order: Order
    shards: np.ndarray
    ends: np.ndarray
    offsets: np.ndarray
    number: int
    blocks: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)


def _pass(order: Order, number: int) -> _Pass:
    if number not in order.passes:
        shards = _permutation(len(order.starts) - 1, (order.seed, _SHARDS, number))
        ends = np.cumsum(np.diff(order.starts)[shards])
        lengths = len(order.ids) // order.streams + (np.arange(order.streams) < len(order.ids) % order.streams)
        offsets = [
            int(_raw(1, (order.seed, _OFFSET, number, stream))[0]) % order.window if length > order.window else 0
            for stream, length in enumerate(lengths.tolist())
        ]
        if len(order.passes) > 1:
            del order.passes[next(iter(order.passes))]
        order.passes[number] = _Pass(order, shards, ends, np.array(offsets, np.int64), number)
    return order.passes[number]


def _in_pass(plan: _Pass, within: np.ndarray) -> np.ndarray:
    """Sample ids at the positions `within` (0 <= j < N) of a pass."""
    order, count = plan.order, len(plan.order.ids)
    depth, stream = np.divmod(within, order.streams)
    begin = stream * (count // order.streams) + np.minimum(stream, count % order.streams)
    length = count // order.streams + (stream < count % order.streams)
    offset = plan.offsets[stream]
    block = (depth + order.window - offset) // order.window
    low = np.maximum(0, offset + (block - 1) * order.window)
    size = np.minimum(length, offset + block * order.window) - low
    flat, inside = begin + low, depth - low
    by_block = np.lexsort((block, stream))
    cuts = np.flatnonzero(np.diff(stream[by_block]) | np.diff(block[by_block])) + 1
    for group in np.split(by_block, cuts):
        first = group[0]
        shuffled = _block(plan, int(stream[first]), int(block[first]), int(size[first]))
        flat[group] += shuffled[inside[group]]
    slot = np.searchsorted(plan.ends, flat, side="right")
    ids: np.ndarray = order.ids[order.starts[plan.shards[slot] + 1] - (plan.ends[slot] - flat)]
    return ids


def _block(plan: _Pass, stream: int, block: int, size: int) -> np.ndarray:
    key = stream, block
    if key not in plan.blocks:
        if len(plan.blocks) >= _BLOCKS_KEPT * plan.order.streams:
            del plan.blocks[next(iter(plan.blocks))]
        plan.blocks[key] = _permutation(size, (plan.order.seed, _BLOCK, plan.number, stream, block))
    return plan.blocks[key]


def _permutation(count: int, key: Iterable[int]) -> np.ndarray:
    return np.argsort(_raw(count, key), kind="stable")


def _raw(count: int, key: Iterable[int]) -> np.ndarray:
    # numpy promises that a bit generator's raw stream never changes; of Generator.permutation it does not.
    return np.random.PCG64(np.random.SeedSequence(tuple(key))).random_raw(count)
