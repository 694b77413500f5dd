"""Images that Python makes: a list of samples, or a function of the image's number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_shards.errors import UserError
from data_shards.manifest import SPLITS
from data_shards.sources.base import MAX_ITEMS, Content, Source
from data_shards.tarfiles import check_key

MAX_KEY = 90  # characters, so that key and suffix fit a tar's header

Make = Callable[[int], tuple[np.ndarray, int]]


class Sample(NamedTuple):
    """One image to pack. `image` is uint8 (C, H, W), or a function that makes it when its turn comes."""

    key: str
    image: np.ndarray | Callable[[], np.ndarray]
    label: int = -1
    split: str = "train"
    origin: str = ""  # what to call it if it turns out bad; the key if empty


@dataclass
class SamplesPart:
    """Samples that are in memory."""

    samples: list[Sample]

    @property
    def names(self) -> list[str]:
        return [sample.origin or sample.key for sample in self.samples]

    def read(self, number: int) -> Content:
        image = self.samples[number].image
        return image() if callable(image) else image

    def close(self) -> None:
        """Nothing was opened."""


@dataclass
class MadePart:
    """Images that a function makes, by their numbers."""

    make: Make
    numbers: np.ndarray

    @property
    def names(self) -> list[str]:
        return [f"image {number}" for number in self.numbers.tolist()]

    def read(self, number: int) -> Content:
        return self.make(int(self.numbers[number]))

    def close(self) -> None:
        """Nothing was opened."""


def from_samples(samples: Sequence[Sample], name: str, classes: Sequence[str]) -> Source:
    """The source of samples in memory; raises `UserError` for unsafe, long or double keys, wrong labels and splits."""
    if not samples:
        raise UserError(f"set {name!r} would hold no image; give at least one")
    seen: set[str] = set()
    for sample in samples:
        check_key(sample.key, f"set {name!r}")
        if "." in sample.key.rpartition("/")[2]:
            raise UserError(
                f"the sample key {sample.key!r} holds a dot, where webdataset would cut it; replace the dot"
            )
        if len(sample.key) > MAX_KEY:
            raise UserError(f"the sample key {sample.key!r} is longer than {MAX_KEY} characters; shorten it")
        if sample.key in seen:
            raise UserError(f"the sample key {sample.key!r} occurs twice in set {name!r}; keys must be unique")
        if not -1 <= sample.label < max(1, len(classes)) or (sample.label >= 0 and not classes):
            raise UserError(
                f"sample {sample.key!r} has the label {sample.label}, but set {name!r} has {len(classes)} classes"
            )
        if sample.split not in SPLITS:
            raise UserError(f"sample {sample.key!r} has the split {sample.split!r}; splits are {', '.join(SPLITS)}")
        seen.add(sample.key)

    def part(indices: np.ndarray) -> SamplesPart:
        return SamplesPart([samples[index] for index in indices.tolist()])

    labels = np.array([sample.label for sample in samples], np.int32)
    splits = np.array([SPLITS.index(sample.split) for sample in samples], np.uint8)
    return Source("samples", labels, tuple(classes), "", part, keys=[sample.key for sample in samples], splits=splits)


def from_function(make: Make, count: int, classes: Sequence[str], identity: str) -> Source:
    """The source of the images `make(0)` to `make(count - 1)`, each (uint8 (C, H, W), label or -1).

    `make` must give the same image for the same number in any process; `identity` changes when what it makes does.
    """
    if not 0 < count <= MAX_ITEMS:
        raise UserError(f"{count} images cannot be made; a set has 1 to {MAX_ITEMS}")

    def part(indices: np.ndarray) -> MadePart:
        return MadePart(make, indices)

    return Source("made", np.full(count, -1, np.int32), tuple(classes), identity, part, numbered=True)
