"""Several sets, or the classes of one, mixed by weight: exact shares, each part in its own exact order."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards import Part, UserError, batches, class_names, class_parts
from data_shards.order import Order, ids_at, locate, make_order, mix, positions
from tests.data_shards.conftest import MakeSet


def order_of(count: int, seed: int = 0, streams: int = 4) -> Order:
    return make_order(np.arange(count), np.arange(0, count + 10, 10).clip(max=count), seed, streams=streams, window=8)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0.01, 100)), min_size=1, max_size=5), st.integers(0, 3))
def test_shares_are_exact_and_each_part_keeps_its_passes(sets: list[tuple[int, float]], seed: int) -> None:
    mixture = mix([order_of(count, seed) for count, _ in sets], [weight for _, weight in sets])
    period = sum(mixture.slots) * 4
    parts, ids = locate(mixture, positions(0, 2 * period))
    total = sum(weight for _, weight in sets)
    for number, ((count, weight), slots) in enumerate(zip(sets, mixture.slots, strict=True)):
        assert abs(slots / sum(mixture.slots) - weight / total) <= len(sets) / 1024
        for cycle in (slice(0, period), slice(period, 2 * period)):
            assert (parts[cycle] == number).sum() == slots * 4, "the share is exact over a period"
        taken = np.sort(ids[parts == number])
        expected = np.sort(ids_at(mixture.orders[number], np.arange(2 * slots * 4)))
        assert np.array_equal(taken, expected), "what a part gives is the beginning of its own endless order"
        assert np.bincount(taken, minlength=count).max() - np.bincount(taken, minlength=count).min() <= 1


def test_a_rank_of_a_mixture_reads_whole_streams_of_each_part() -> None:
    mixture = mix([order_of(400, 1), order_of(400, 1)], [3, 1])
    period = sum(mixture.slots) * 4
    whole = locate(mixture, positions(0, period))
    for world in (2, 4):
        ranks = [locate(mixture, positions(0, period, rank, world)) for rank in range(world)]
        for value in (0, 1):
            assert np.array_equal(np.stack([rank[value] for rank in ranks], 1).reshape(-1), whole[value])
    lanes = [set(ids_at(mixture.orders[1], np.arange(lane, 400, 4)).tolist()) for lane in range(4)]
    parts, ids = locate(mixture, positions(0, 4 * 400, 2, 4))
    assert set(ids[parts == 1].tolist()) == lanes[2]


def test_a_mixture_is_read_the_same_at_any_world_and_from_any_place(make_set: MakeSet) -> None:
    parts = [Part(make_set(60, name="one", classes=3), 3.0), Part(make_set(40, name="two", classes=5), 1.0)]
    assert class_names(parts)[2:4] == ("one/class-2", "two/class-0")
    whole = list(islice(batches(parts, batch=24, seed=5), 60))
    share = np.concatenate([one.parts.numpy() for one in whole]).mean()
    assert 0.2 < share < 0.3
    for one in whole[:5]:
        for label, part, key in zip(one.labels.tolist(), one.parts.tolist(), one.keys, strict=True):
            assert label == (3 + int(key[1:]) % 5 if part else int(key[1:]) % 3)
    for world, workers in ((2, 0), (3, 2), (8, 0)):
        ranks = [
            list(islice(batches(parts, batch=24, seed=5, rank=rank, world=world, images_seen=240, workers=workers), 5))
            for rank in range(world)
        ]
        for step, expected in enumerate(whole[10:15]):
            keys = [key for together in zip(*(rank[step].keys for rank in ranks), strict=True) for key in together]
            assert keys == expected.keys


def test_classes_are_balanced_or_weighted(make_set: MakeSet) -> None:
    shard_set = make_set(100, classes=7)
    for weights, expected in ((None, [1 / 7] * 7), ({"class-0": 1.0, "class-6": 3.0}, [0.25, 0, 0, 0, 0, 0, 0.75])):
        parts = class_parts(shard_set, weights)
        assert class_names(parts) == shard_set.manifest.classes
        labels = np.concatenate([one.labels.numpy() for one in islice(batches(parts, batch=24, seed=0), 1024)])
        assert np.bincount(labels, minlength=7) / len(labels) == pytest.approx(expected, abs=0.007)
    with pytest.raises(UserError, match="no class 'dog'"):
        class_parts(shard_set, {"dog": 1.0})


def test_what_cannot_be_mixed_is_refused(make_set: MakeSet) -> None:
    shard_set = make_set(30)
    with pytest.raises(UserError, match="weight 0"):
        batches([Part(shard_set, 0.0), Part(shard_set)], batch=8, seed=0)
    with pytest.raises(UserError, match="at least one part"):
        batches([], batch=8, seed=0)
