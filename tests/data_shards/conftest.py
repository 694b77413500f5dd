from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from data_shards import Sample, ShardSet, pack_images

MakeSet = Callable[..., ShardSet]


def picture(number: int, channels: int = 1, side: int = 8) -> np.ndarray:
    """An image that no other number has."""
    return np.random.default_rng(number).integers(0, 256, (channels, side, side), dtype=np.uint8)


@pytest.fixture
def make_set(tmp_path: Path) -> MakeSet:
    def make(
        count: int = 50, name: str = "set", shard_samples: int = 7, classes: int = 5, **options: object
    ) -> ShardSet:
        samples = [
            Sample(f"k{i:05d}", picture(i), i % classes, "reference" if i % 10 == 9 else "train") for i in range(count)
        ]
        names = [f"class-{i}" for i in range(classes)]
        return pack_images(
            samples,
            tmp_path / name,
            name=name,
            shape=(1, 8, 8),
            classes=names,
            shard_samples=shard_samples,
            **options,  # type: ignore[arg-type]
        )

    return make


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that exists only if something ran that must not."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "untrusted input was executed"
