"""Shards to batches, at any world size and number of loader processes."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_shards import Batch, ShardSet, UserError, batches, episode, load_images, open_set
from tests.data_shards.conftest import MakeSet, picture

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def sequence(shard_set: ShardSet, world: int, steps: int, **options: Any) -> list[str]:
    """Keys of the global sequence, put together again from the ranks' batches."""
    ranks = [
        list(islice(batches(shard_set, batch=24, seed=1, rank=r, world=world, **options), steps)) for r in range(world)
    ]
    clock = options.get("images_seen", 0)
    for rank in ranks:
        assert [part.images_seen for part in rank] == [clock + 24 * (i + 1) for i in range(steps)]
    return [
        key
        for step in zip(*ranks, strict=True)
        for keys in zip(*(part.keys for part in step), strict=True)
        for key in keys
    ]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_sequence_depends_on_neither_world_nor_workers(make_set: MakeSet, workers: int) -> None:
    shard_set = make_set(100)
    expected = sequence(shard_set, 1, 9)
    assert sorted(expected[:90]) == sorted(f"k{i:05d}" for i in range(100) if i % 10 != 9)
    for world in (1, 2, 3, 4, 8):
        assert sequence(shard_set, world, 9, workers=workers) == expected


def test_resuming_at_another_world_size_mid_pass_goes_on_identically(make_set: MakeSet) -> None:
    shard_set = make_set(100)
    expected = sequence(shard_set, 2, 10)
    for world, workers in ((1, 0), (3, 0), (4, 0), (2, 3)):
        assert sequence(shard_set, world, 5, images_seen=5 * 24, workers=workers) == expected[5 * 24 :]


def test_images_and_labels_are_those_of_the_keys(make_set: MakeSet) -> None:
    shard_set = make_set(30)
    for cache in (0, 1 << 20):
        for part in islice(batches(shard_set, batch=8, seed=0, cache_bytes=cache), 9):
            assert part.images.dtype == torch.uint8 and part.labels.dtype == torch.int64
            assert part.images.shape == (8, 1, 8, 8)
            for image, label, key in zip(part.images, part.labels.tolist(), part.keys, strict=True):
                assert np.array_equal(image.numpy(), picture(int(key[1:])))
                assert label == int(key[1:]) % 5


@pytest.mark.parametrize("cache", [0, 1 << 20])
@pytest.mark.parametrize("workers", [1, 3])
def test_batches_stay_what_they_were_however_far_ahead_the_workers_are(make_set: MakeSet, cache: int, workers: int) -> None:
    shard_set = make_set(60)
    kept = []
    for number, part in enumerate(batches(shard_set, batch=8, seed=0, cache_bytes=cache, workers=workers)):
        kept.append(part)
        if number % 7 == 0:
            time.sleep(0.1)  # the workers now do all that they may do ahead
        if number == 40:
            break
    for part in kept:
        for image, key in zip(part.images, part.keys, strict=True):
            assert np.array_equal(image.numpy(), picture(int(key[1:])))


def test_two_ranks_get_different_samples(make_set: MakeSet) -> None:
    one, two = (next(batches(make_set(60, name=f"s{r}"), batch=24, seed=0, rank=r, world=2)) for r in range(2))
    assert not set(one.keys) & set(two.keys)


def test_a_batch_larger_than_the_set_spans_passes(make_set: MakeSet) -> None:
    part = next(batches(make_set(5, classes=1), batch=16, seed=0))
    assert sorted(part.keys)[::1].count("k00000") in (3, 4) and len(part.keys) == 16


def test_a_subset_is_read_alone(make_set: MakeSet) -> None:
    shard_set = make_set(60)
    support, _ = episode(shard_set, label=2, shots=4, queries=0, seed=0)
    keys = {key for part in islice(batches(shard_set, batch=8, seed=0, subset=support), 5) for key in part.keys}
    assert keys == {key.decode() for key in shard_set.samples["key"][support]}
    with pytest.raises(UserError, match="not in split"):
        batches(shard_set, batch=8, seed=0, subset=shard_set.indices("reference"))


def test_reading_leaves_torchs_generator_alone(make_set: MakeSet) -> None:
    """The training's noise must not depend on whether a loader was made."""
    shard_set = make_set(30)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(islice(batches(shard_set, batch=8, seed=0), 3))
    assert torch.equal(torch.rand(3), expected)


def test_load_images_keeps_the_callers_order(make_set: MakeSet) -> None:
    shard_set = make_set(30)
    ids = np.array([7, 0, 29, 7])
    images, labels = load_images(shard_set, ids)
    numbers = [int(key[1:]) for key in shard_set.samples["key"][ids]]
    assert images.dtype == torch.uint8 and images.shape == (4, 1, 8, 8)
    assert np.array_equal(images.numpy(), np.stack([picture(n) for n in numbers]))
    assert labels.tolist() == [n % 5 for n in numbers]
    with pytest.raises(UserError, match=r"must lie in 0\.\.29"):
        load_images(shard_set, [30])
    assert load_images(shard_set, [])[0].shape == (0, 1, 8, 8)


def test_episodes_are_disjoint_of_one_class_and_repeatable(make_set: MakeSet) -> None:
    shard_set = make_set(100)
    support, query = episode(shard_set, label="class-3", shots=5, queries=10, seed=4)
    assert len(support) == 5 and len(query) == 10 and not set(support) & set(query)
    assert set(shard_set.samples["label"][np.concatenate([support, query])]) == {3}
    again = episode(shard_set, label=3, shots=5, queries=10, seed=4)
    assert np.array_equal(support, again[0]) and np.array_equal(query, again[1])
    assert not np.array_equal(support, episode(shard_set, label=3, shots=5, queries=10, seed=5)[0])
    both, _ = episode(shard_set, label=[1, "class-3"], shots=5, queries=10, seed=4)
    assert np.bincount(shard_set.samples["label"][both]).tolist() == [0, 5, 0, 5] and np.array_equal(both[5:], support)
    with pytest.raises(UserError, match="name one twice"):
        episode(shard_set, label=[3, "class-3"], shots=1, queries=1, seed=0)
    with pytest.raises(UserError, match="need 25 images, and set has 20"):
        episode(shard_set, label=3, shots=15, queries=10, seed=0)


def test_bad_arguments_are_refused_at_once(make_set: MakeSet) -> None:
    shard_set = make_set(30)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"batch": 25, "world": 2}, "divide both"),
        ({"batch": 0}, "batch 0"),
        ({"batch": 8, "workers": -1}, "workers -1"),
        ({"batch": 8, "split": "test"}, "train, reference"),
    ]
    for options, word in cases:
        with pytest.raises(UserError, match=word):
            batches(shard_set, seed=0, **options)
    small = make_set(5, name="small")
    with pytest.raises(UserError, match="holds no image"):
        batches(small, batch=8, seed=0, split="reference")


def test_a_set_travels_to_a_process_without_its_table(make_set: MakeSet) -> None:
    shard_set = make_set(30)
    assert len(shard_set.samples["key"]) == 30
    data = pickle.dumps(shard_set)
    copy = pickle.loads(data)
    assert b"k00003" not in data and np.array_equal(copy.samples["key"], shard_set.samples["key"])


def test_the_package_needs_no_ray() -> None:
    code = (
        "import sys, data_shards; sys.exit(any(m.split('.')[0] in ('ray', 'deepspeed', 'wandb') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_a_batch_is_a_value(make_set: MakeSet) -> None:
    part = next(batches(open_set(make_set(20).path), batch=4, seed=0))
    assert isinstance(part, Batch) and part.images_seen == 4
