"""KanjiVG: 6,703 characters as strokes, from the PyPI package kanjivg, drawn like Quick, Draw!: ink 255 on black."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from data_shards.datasets.download import Archive
from data_shards.datasets.plan import POOL, REFERENCE, SIDE, SetPlan
from data_shards.errors import UserError
from data_shards.images import open_image
from data_shards.sources.made import Sample

ARCHIVE = Archive(
    registry="pypi",
    package="kanjivg",
    version="20260714",
    filename="kanjivg-20260714-py3-none-any.whl",
    sha256="5190e7ec4eb513dbe6865b2ed52c58287fc10ea514b9409e4cf66ce7db41644d",
)
VERSION = 1
LICENCE = "CC BY-SA 3.0 (KanjiVG, Ulrich Apel)"
SOURCE = "PyPI kanjivg==20260714"
SHARD_SAMPLES = 512
SETS = 2
STROKE = 4.0  # of a box of 109, so 1.2 of 32 pixels: measured as ink over length, a Quick, Draw! line has 1.0-1.1

_MEMBER = re.compile(r"kanji/([0-9a-f]{5})\.svg")  # a variant's name goes on with "-"
_NUMBERS = re.compile(r'<g id="kvg:StrokeNumbers.*?</g>', re.DOTALL)
_MAX_BYTES = 1024 * 1024


def sets(archive: Path) -> Iterator[SetPlan]:
    """The target (50 characters as pool, 500 as reference, chosen by seed 0), then the source with all the others."""
    with zipfile.ZipFile(archive) as wheel:
        codes = codes_of(wheel)
    order = [codes[index] for index in np.random.RandomState(0).permutation(len(codes))]
    held = {"train": order[:POOL], "reference": order[POOL : POOL + REFERENCE]}
    plan = partial(SetPlan, classes=(), licence=LICENCE, source=SOURCE)
    yield plan("kanjivg/target", partial(_samples, archive, held))
    rest = {"train": order[POOL + REFERENCE :]}
    yield plan("kanjivg/source", partial(_samples, archive, rest), shard_samples=SHARD_SAMPLES)


def render(svg: str) -> np.ndarray:
    """Draws one character's strokes, without their numbers, as uint8 (1, 32, 32), ink 255 on 0."""
    try:
        import resvg_py
    except ImportError:
        raise UserError("kanjivg needs the package resvg_py to draw its strokes; `pip install resvg_py`") from None
    svg = _NUMBERS.sub("", svg)
    svg = re.sub(r"stroke-width:[0-9.]+", f"stroke-width:{STROKE}", svg).replace("stroke:#000000", "stroke:#ffffff")
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, background="#000000", skip_system_fonts=True)
    return np.asarray(open_image(bytes(png)).convert("L"))[None].copy()


def codes_of(wheel: zipfile.ZipFile) -> list[str]:
    """The characters' code points in hexadecimal, without variants, sorted."""
    return sorted(match[1] for name in wheel.namelist() if (match := _MEMBER.fullmatch(name)))


def read_svg(wheel: zipfile.ZipFile, code: str) -> str:
    """One character's drawing as text."""
    member = wheel.getinfo(f"kanji/{code}.svg")
    if member.file_size > _MAX_BYTES:
        raise UserError(f"{member.filename} in {wheel.filename} has {member.file_size} bytes; fetch the archive again")
    return wheel.read(member).decode("utf-8")


def _samples(archive: Path, splits: dict[str, list[str]]) -> Iterator[Sample]:
    with zipfile.ZipFile(archive) as wheel:
        for split, codes in splits.items():
            for code in sorted(codes):
                yield Sample(f"u{code}", render(read_svg(wheel, code)), split=split)
