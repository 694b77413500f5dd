"""The images that are read: a set of graft's, and the same bytes end to end for the peers' writers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data_shards import Sample, ShardSet, open_set, pack_images
from data_shards.shard_files import ShardFiles


@dataclass(frozen=True)
class Images:
    """A set to read, and the folder in which the peers keep their own forms of it."""

    title: str
    source: ShardSet
    scratch: Path

    @property
    def samples(self) -> Path:
        return self.scratch / "samples"


def gray_images(folder: Path, count: int, packed: Path | None) -> Images:
    """The set `packed`, such as QuickDraw's drawings, or strokes drawn here, 32 px gray."""
    if packed is not None:
        return _with_samples(f"{packed.parent.name} drawings", open_set(packed), folder)
    made = folder / f"strokes-{count}" / "set"
    if not made.exists():
        samples = [Sample(f"s{i:06d}", _strokes(i), i % 100) for i in range(count)]
        names = [f"class-{i}" for i in range(100)]
        pack_images(samples, made, name="strokes", shape=(1, 32, 32), classes=names, shard_samples=1000)
    return _with_samples("drawn strokes", open_set(made), folder)


def colour_images(folder: Path, count: int, side: int = 64) -> Images:
    """Blurred colours with ellipses and a little noise, RGB, whose PNGs are as large as a photograph's."""
    made = folder / f"blobs-{side}-{count}" / "set"
    if not made.exists():
        samples = [Sample(f"s{i:06d}", _blobs(i, side), i % 10) for i in range(count)]
        names = [f"class-{i}" for i in range(10)]
        pack_images(samples, made, name="blobs", shape=(3, side, side), classes=names, shard_samples=400)
    return _with_samples("coloured blobs", open_set(made), folder)


def _with_samples(title: str, source: ShardSet, folder: Path) -> Images:
    identity = hashlib.sha256(source.manifest.sha256.encode()).hexdigest()[:16]
    images = Images(title, source, folder / identity)
    if not (images.samples / "table.npy").exists():
        images.samples.mkdir(parents=True, exist_ok=True)
        table, offset = [], 0
        with (images.samples / "samples.bin").open("wb") as file:
            for data, label in _encoded(source):
                file.write(data)
                table.append((offset, len(data), label))
                offset += len(data)
        np.save(images.samples / "table.npy", np.array(table, np.int64))
    return images


def _encoded(source: ShardSet) -> Iterator[tuple[bytes, int]]:
    with ShardFiles(source) as files:
        for begin in range(0, len(source), 1024):
            ids = np.arange(begin, min(len(source), begin + 1024))
            yield from zip(files.read(ids), source.samples["label"][ids].tolist(), strict=True)


def _strokes(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    image = Image.new("L", (128, 128))
    for _ in range(rng.integers(2, 6)):
        points = np.clip(rng.normal(64, 30, (rng.integers(3, 9), 2)), 4, 124)
        ImageDraw.Draw(image).line([tuple(point) for point in points.tolist()], fill=255, width=6)
    return np.asarray(image.resize((32, 32), Image.Resampling.LANCZOS))[None]


def _blobs(seed: int, side: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    for _ in range(rng.integers(1, 4)):
        corner = rng.integers(0, side * 3 // 4, 2)
        box = [*corner.tolist(), *(corner + rng.integers(side // 8, side // 2, 2)).tolist()]
        ImageDraw.Draw(image).ellipse(box, fill=tuple(rng.integers(0, 256, 3).tolist()))
    noisy = np.asarray(image, np.float32) + rng.normal(0, 3, (side, side, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8).transpose(2, 0, 1)
