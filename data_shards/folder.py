"""Any folder of images into a set."""

from __future__ import annotations

import csv
import os
import re
from functools import partial
from pathlib import Path

import numpy as np

from data_shards.errors import BadImage, UserError
from data_shards.images import BACKGROUND, FORMATS, MAX_BYTES, SUFFIXES, fit_image, open_image
from data_shards.manifest import ShardSet
from data_shards.pack import SHARD_BYTES, SHARD_SAMPLES, MapFn, Progress, Sample, pack_images
from data_shards.tarfiles import local_path

LABELS = "labels.csv"
# Pictures in other formats are someone's data: they are counted as bad, where a text file is passed over.
_OTHER_PICTURES = ("bmp", "gif", "tif", "tiff", "jp2", "avif", "heic", "svg", "eps", "pdf", "ppm", "pgm", "tga", "ico")


def pack_folder(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    size: int,
    channels: int = 3,
    *,
    reference: float = 0.0,
    max_bad: int = 0,
    seed: int = 0,
    background: int = BACKGROUND,
    name: str | None = None,
    licence: str = "unknown",
    source: str | None = None,
    shard_samples: int = SHARD_SAMPLES,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
    map_fn: MapFn = map,
) -> ShardSet:
    """Packs every image under `folder` into the set `out`, fitted to `size` x `size` pixels (see `images.py`).

    Labels come from `labels.csv` (columns file,label) if there is one, else from the first-level subfolders if no
    image lies outside them, else there are none. `reference` is the share (0 <= x < 1) of the images held out, by
    `seed`, as the split "reference"; the draw precedes everything else. Images that cannot be read are listed in the
    manifest with the reason, and are an error beyond `max_bad` of them.

    Raises `UserError` for a missing or unreadable folder, one without images, labels that do not fit, or an existing
    `out` (without `overwrite`).
    """
    root = local_path(folder)
    if size < 1 or channels not in (1, 3):
        raise UserError(f"size {size} must be at least 1 pixel and channels {channels} must be 1 (gray) or 3 (RGB)")
    files = _image_files(root)
    labels, classes = _labels(root, files)
    held_out = _reference(len(files), reference, seed)
    samples = [
        Sample(
            key=f"{number:08d}-{_slug(Path(file).with_suffix('').as_posix())}"[:80].rstrip("-"),
            image=partial(read_image, root / file, size, channels, background),
            label=labels[number],
            split="reference" if number in held_out else "train",
            origin=file,
        )
        for number, file in enumerate(files)
    ]
    return pack_images(
        samples,
        out,
        name=name or root.resolve().name,
        shape=(channels, size, size),
        classes=classes,
        shard_samples=shard_samples,
        shard_bytes=shard_bytes,
        licence=licence,
        source=source or root.resolve().name,
        seed=seed,
        max_bad=max_bad,
        overwrite=overwrite,
        progress=progress,
        map_fn=map_fn,
    )


def read_image(path: Path, size: int, channels: int, background: int = BACKGROUND) -> np.ndarray:
    """Reads an image file and fits it to uint8 (channels, size, size); raises `BadImage` with the reason."""
    if path.suffix.lower().lstrip(".") not in SUFFIXES:
        raise BadImage(f"its format is not one of {', '.join(FORMATS)}; convert it")
    try:
        length = path.stat().st_size
        if not path.is_file() or length > MAX_BYTES:
            raise BadImage(f"it is no plain file of at most {MAX_BYTES} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise BadImage(f"it cannot be read ({error.strerror})") from None
    return fit_image(open_image(data), (size, size), channels, background=background)


def _image_files(root: Path) -> list[str]:
    """The pictures under `root` as sorted relative POSIX paths; hidden files and folders are passed over."""
    if not root.exists():
        raise UserError(f"there is no folder {root}; check the path")
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; give the folder that holds the images")
    files: list[str] = []
    for folder, subfolders, names in os.walk(root, onerror=_unreadable):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            if not name.startswith(".") and name.rpartition(".")[2].lower() in SUFFIXES + _OTHER_PICTURES:
                files.append((Path(folder) / name).relative_to(root).as_posix())
    if not files:
        raise UserError(f"folder {root} holds no image; put {', '.join(FORMATS)} files into it or its subfolders")
    return sorted(files)


def _unreadable(error: OSError) -> None:
    raise UserError(f"folder {error.filename} cannot be read ({error.strerror}); check its permissions")


def _labels(root: Path, files: list[str]) -> tuple[list[int], tuple[str, ...]]:
    """One label per file (-1: none) and the class names, sorted."""
    table = root / LABELS
    if table.is_file():
        names = _read_table(table, set(files))
        missing = [file for file in files if file not in names]
        if missing:
            raise UserError(
                f"{table} has no row for {missing[0]} ({len(missing)} such images); add it or remove the image"
            )
    else:
        inside = sum("/" in file for file in files)
        if 0 < inside < len(files):
            lone = next(file for file in files if "/" not in file)
            raise UserError(
                f"folder {root} holds images in subfolders and {len(files) - inside} beside them, such as {lone}; move"
                f" these into a subfolder, or name every label in {LABELS}"
            )
        names = {file: file.split("/", 1)[0] for file in files} if inside else {}
    classes = tuple(sorted(set(names.values())))
    number = {label: index for index, label in enumerate(classes)}
    return [number[names[file]] if names else -1 for file in files], classes


def _read_table(table: Path, files: set[str]) -> dict[str, str]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} cannot be read as CSV in UTF-8 ({error})") from None
    names: dict[str, str] = {}
    for line, row in enumerate(rows, start=2):
        file, label = (row.get("file") or "").strip(), (row.get("label") or "").strip()
        if not file or not label:
            raise UserError(f"{table} line {line} lacks a file or a label; its columns must be named file and label")
        if file not in files:
            raise UserError(f"{table} line {line} names {file!r}, which is no image in the folder; correct the row")
        if names.setdefault(file, label) != label:
            raise UserError(f"{table} line {line} gives {file!r} a second label {label!r}; keep one")
    return names


def _reference(count: int, share: float, seed: int) -> set[int]:
    if not 0 <= share < 1:
        raise UserError(f"reference {share} must be a share of the images, at least 0 and under 1")
    held = round(share * count)
    if held == count or (share > 0 and held == 0):
        raise UserError(f"a reference share of {share} leaves one split of {count} images empty; change the share")
    draw = np.argsort(np.random.PCG64(np.random.SeedSequence((seed, 1))).random_raw(count), kind="stable")
    return set(draw[:held].tolist())


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-")
