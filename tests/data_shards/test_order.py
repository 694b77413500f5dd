"""The order is a pure function of (seed, pass, samples per shard)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards import UserError
from data_shards.order import Order, make_order, position, sample_indices, worlds

counts_of_shards = st.lists(st.one_of(st.just(1), st.integers(1, 8), st.integers(30, 90)), min_size=1, max_size=12)


def order_of(counts: list[int], seed: int = 0, streams: int = 24, window: int = 1024) -> Order:
    bounds = 1000 + np.cumsum([0, *counts])
    return make_order(np.arange(1000, bounds[-1]), bounds, seed, streams=streams, window=window)


@settings(max_examples=60, deadline=None)
@given(counts_of_shards, st.integers(0, 5), st.sampled_from([1, 3, 24]), st.sampled_from([1, 4, 16, 1024]))
def test_every_pass_holds_each_sample_exactly_once(counts: list[int], seed: int, streams: int, window: int) -> None:
    order, total = order_of(counts, seed, streams, window), sum(counts)
    for number in range(2):
        ids = sample_indices(order, number * total, total)
        assert sorted(ids.tolist()) == order.ids.tolist()


@settings(max_examples=40, deadline=None)
@given(counts_of_shards, st.integers(0, 5), st.integers(0, 7))
def test_every_world_makes_the_same_global_batches(counts: list[int], seed: int, skipped: int) -> None:
    order, batch = order_of(counts, seed, window=16), 24
    for start in (skipped * batch, skipped * batch + 5 * batch):
        whole = sample_indices(order_of(counts, seed, window=16), start, batch)
        for world in (1, 2, 3, 4, 8):
            parts = [sample_indices(order, start, batch, rank, world) for rank in range(world)]
            assert np.array_equal(np.stack(parts, 1).reshape(-1), whole)


@settings(max_examples=30, deadline=None)
@given(counts_of_shards, st.integers(0, 200))
def test_any_position_is_found_without_walking_to_it(counts: list[int], start: int) -> None:
    walked = sample_indices(order_of(counts, 3, window=16), 0, start + 24)[start:]
    assert np.array_equal(sample_indices(order_of(counts, 3, window=16), start, 24), walked)


def test_ranks_read_whole_streams_and_disjoint_samples() -> None:
    order = order_of([100] * 24, window=16)
    read = [
        np.concatenate([sample_indices(order, p, 48, rank, 4) for p in range(0, 2400, 48)]) - 1000 for rank in range(4)
    ]
    for rank, ids in enumerate(read):
        shards = np.unique(ids // 100)
        assert len(shards) == 6, "24 equal shards are 24 streams, a rank of 4 owns 6 of them"
        for other in read[rank + 1 :]:
            assert not np.intersect1d(ids, other).size


def test_passes_seeds_and_classes_are_mixed() -> None:
    order = order_of([250] * 4)
    first, second = sample_indices(order, 0, 1000), sample_indices(order, 1000, 1000)
    other = sample_indices(order_of([250] * 4, seed=1), 0, 1000)
    for one, two in ((first, second), (first, other), (second, other), (first, np.arange(1000))):
        assert abs(np.corrcoef(np.argsort(one), np.argsort(two))[0, 1]) < 0.2
    assert len(np.unique(first[:24] // 250)) >= 3, "a batch draws from many shards"


def test_the_order_never_changes_between_versions() -> None:
    """A resumed run must see the samples that the stopped one would have seen: these numbers are a contract."""
    order = order_of([5, 1, 9, 3], seed=7, streams=4, window=4)
    assert sample_indices(order, 0, 12).tolist() == [
        1015,
        1003,
        1008,
        1013,
        1016,
        1002,
        1011,
        1014,
        1000,
        1006,
        1009,
        1012,
    ]


@pytest.mark.parametrize(
    ("batch", "world", "rank", "word"), [(64, 3, 0, "divide both"), (25, 5, 0, "divide both"), (8, 2, 2, "rank 2")]
)
def test_a_batch_that_does_not_divide_is_refused(batch: int, world: int, rank: int, word: str) -> None:
    with pytest.raises(UserError, match=word):
        sample_indices(order_of([50]), 0, batch, rank, world)


def test_other_bad_arguments_are_refused() -> None:
    with pytest.raises(UserError, match="no sample"):
        order_of([])
    with pytest.raises(UserError, match="seed -1"):
        order_of([3], seed=-1)
    with pytest.raises(UserError, match="window 0"):
        order_of([3], window=0)
    with pytest.raises(UserError, match="images_seen -4"):
        sample_indices(order_of([3]), -4, 4)


def test_worlds_and_resume_state() -> None:
    assert worlds(64) == [1, 2, 4, 8]
    assert worlds(48, 24) == [1, 2, 3, 4, 6, 8, 12, 24]
    assert position(2503, 1000) == {"pass": 2, "samples": 503}
