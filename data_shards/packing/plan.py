"""What will be packed, cut into shards up front: a pure function of the source's list and the options.

The held-out split is drawn before anything else. The items are put in a seeded random order, so that reading a shard in
sequence is already mixed, and cut into shards of as many samples as cannot exceed the bytes of a shard. So the number and
the names of the shards are known before any image is read, and each can be made by any process at any time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_shards.errors import UserError
from data_shards.images import BACKGROUND, ENCODINGS, QUALITY, check_shape
from data_shards.manifest import SPLITS
from data_shards.sources.base import Part, Source
from data_shards.tarfiles import BLOCK, RECORD

SHARD_SAMPLES = 4096
SHARD_BYTES = 256 * 1024 * 1024
MAX_NEAR = 8  # of 64 bits
NO_NEAR = -1


@dataclass(frozen=True)
class Options:
    """How images are made; the bytes of the shards follow from these, the source and its split."""

    shape: tuple[int, int, int]
    encoding: str = "png"
    quality: int = QUALITY
    background: int = BACKGROUND
    seed: int = 0
    shard_samples: int = SHARD_SAMPLES
    shard_bytes: int = SHARD_BYTES
    near: int = NO_NEAR


@dataclass(frozen=True)
class Task:
    """One shard to make; it holds all that is needed, and nothing of the others."""

    number: int
    indices: np.ndarray  # int64 (n,), of the items in their source
    labels: np.ndarray  # int32 (n,)
    splits: np.ndarray  # uint8 (n,), index into SPLITS
    part: Part
    keys: list[str] | None
    classes: int


@dataclass(frozen=True)
class Plan:
    """All shards of a set."""

    options: Options
    order: np.ndarray  # int64 (N,), of the items
    splits: np.ndarray  # uint8 (N,), by item
    shard_samples: int

    @property
    def shards(self) -> int:
        return -(-len(self.order) // self.shard_samples)

    def tasks(self, source: Source, skip: frozenset[int] = frozenset()) -> Iterator[Task]:
        """The shards, one after the other, but for those with a number in `skip`."""
        for number in range(self.shards):
            if number not in skip:
                indices = self.order[number * self.shard_samples : (number + 1) * self.shard_samples]
                keys = [f"{index:08d}" for index in indices.tolist()] if source.numbered else None
                if source.keys is not None:
                    keys = [source.keys[index] for index in indices.tolist()]
                yield Task(number, indices, source.labels[indices], self.splits[indices], source.part(indices), keys,
                           len(source.classes))


def make_plan(source: Source, options: Options, reference: float = 0.0) -> Plan:
    """Plans the items of a source; a share `reference` (0 <= x < 1) of them is held out, unless the source says which are.

    Raises `UserError` for options that do not fit.
    """
    check_options(options)
    count, splits = len(source), source.splits
    if splits is None:
        splits = np.zeros(count, np.uint8)
        splits[_held_out(count, reference, options.seed)] = SPLITS.index("reference")
    order = np.arange(count)
    if not source.numbered:  # what a function makes has no order to hide, and may be made many at once
        order = np.argsort(np.random.PCG64(np.random.SeedSequence(options.seed)).random_raw(count), kind="stable")
    return Plan(options, order, splits, samples_in(options, bool(source.classes)))


def samples_in(options: Options, labelled: bool) -> int:
    """How many samples a shard may have so that its bytes stay under the bound even if no image can be compressed."""
    pixels = math.prod(options.shape)
    overhead = 700 if options.encoding == "jpeg" else 80  # the tables of a JPEG; the chunks of a PNG
    image = BLOCK + -(-(pixels + pixels // 20 + overhead) // BLOCK) * BLOCK
    return max(1, min(options.shard_samples, (options.shard_bytes - RECORD) // (image + 2 * BLOCK * labelled)))


def check_options(options: Options) -> None:
    """Raises `UserError` naming the option that cannot be."""
    check_shape(options.shape)
    if options.shard_samples < 1 or options.shard_bytes < 1 or options.seed < 0:
        raise UserError(
            f"shard_samples {options.shard_samples} and shard_bytes {options.shard_bytes} must be >= 1, seed"
            f" {options.seed} >= 0"
        )
    if options.encoding not in ENCODINGS:
        raise UserError(f"encoding {options.encoding!r} does not exist; choose one of {', '.join(ENCODINGS)}")
    if not 1 <= options.quality <= 100:
        raise UserError(f"quality {options.quality} must be 1 to 100; it is that of JPEG, 95 keeps nearly all that is seen")
    if not 0 <= options.background <= 255:
        raise UserError(f"background {options.background} must be a gray value, 0 (black) to 255 (white)")
    if not NO_NEAR <= options.near <= MAX_NEAR:
        raise UserError(f"near {options.near} must be a number of bits, 0 to {MAX_NEAR}, or {NO_NEAR} to leave it out")


def _held_out(count: int, share: float, seed: int) -> np.ndarray:
    if not 0 <= share < 1:
        raise UserError(f"reference {share} must be a share of the images, at least 0 and under 1")
    held = round(share * count)
    if held == count or (share > 0 and held == 0):
        raise UserError(f"a reference share of {share} leaves one split of {count} images empty; change the share")
    draw = np.argsort(np.random.PCG64(np.random.SeedSequence((seed, 1))).random_raw(count), kind="stable")
    return draw[:held]
