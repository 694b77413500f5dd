"""What a dataset says about each set it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from data_shards.packing.plan import SHARD_SAMPLES
from data_shards.sources.made import Sample

SIDE = 32  # pixels: all the drawings below share one size and one polarity, ink 255 on black 0
POOL = 50  # images in a target's support pool, its split "train"
REFERENCE = 500  # images in a target's split "reference", where the dataset has so many


@dataclass(frozen=True)
class SetPlan:
    """One set to pack: its name (also its folder under the root) and what is in it."""

    name: str
    samples: Callable[[], Iterable[Sample]]
    classes: tuple[str, ...]
    licence: str
    source: str
    shape: tuple[int, int, int] = (1, SIDE, SIDE)
    shard_samples: int = SHARD_SAMPLES
