"""Tar archives: of image files, or WebDataset tars (`<key>.png` beside `<key>.cls`, `.json` or `.txt`), one or a folder.

They are read in place and nothing is extracted under a name of theirs. A compressed one cannot be read at random: it is
unpacked as a whole into the scratch folder first, under a running cap.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.errors import BadImage, UserError
from data_shards.images import FORMATS, SUFFIXES
from data_shards.sources.base import (
    Files,
    FlatPart,
    Source,
    check_count,
    check_name,
    is_picture,
    pick,
    stamp,
    unpack,
)
from data_shards.sources.labels import LABELS, MAX_CLASS_NAME, Labels, from_names, from_values, without_wrapper
from data_shards.tarfiles import members

MAX_LABEL_BYTES = 64 * 1024
MAX_TABLE = 256 * 1024 * 1024  # bytes of a labels.csv
LABEL_SUFFIXES = ("cls", "json", "txt")
_OPENERS: dict[bytes, Callable[[Path], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_ZSTD = b"\x28\xb5\x2f\xfd"


def open_tar(path: Path, scratch: Path, image_column: str | None = None) -> Source:
    """A tar of image files, whose classes are its folders or stand in a labels.csv inside; or a WebDataset tar.

    Raises `UserError` for links, devices, unsafe names, damage, and what unpacks to far more than its own size.
    """
    plain = unpacked(path, scratch)
    found = [(check_name(m.name, path), m.offset, m.size) for m in members(plain, what="archive", long_names=True)]
    keys = {_split(name)[0] for name, _, _ in found if is_picture(name)}
    if any(suffix in LABEL_SUFFIXES and key in keys for key, suffix in (_split(name) for name, _, _ in found)):
        return _webdataset([(path, plain, found)], image_column)
    pictures = sorted(member for member in found if is_picture(member[0]))
    if not pictures:
        raise UserError(f"{path} holds no image; it should hold {', '.join(FORMATS)} files")
    check_count(len(pictures), path)
    names = [name for name, _, _ in pictures]
    if repeated := next((name for name, after in pairwise(names) if name == after), None):
        raise UserError(f"{path} holds {repeated!r} twice; make the archive anew")
    table = {name: (offset, size) for name, offset, size in found if name.rpartition("/")[2] == LABELS}
    head = without_wrapper(names, table)
    place = table.get(head + LABELS, table.get(LABELS))
    lines = None if place is None else io.StringIO(_text(plain, *place, MAX_TABLE, path), newline="")
    labels, classes = from_names([name[len(head) :] for name in names], lines, str(path))
    offsets, sizes = (np.array(column, np.int64) for column in list(zip(*pictures, strict=True))[1:])
    return _flat("tar", [(path, plain)], names, np.zeros(len(names), np.int32), offsets, sizes, (labels, classes), ())


def open_webdataset(root: Path, scratch: Path, image_column: str | None = None) -> Source:
    """A WebDataset tar or a folder of them; `image_column` is the suffix to take where samples hold several images."""
    paths = [root] if root.is_file() else sorted(path for path in root.iterdir() if _is_tar(path.name))
    if not paths:
        raise UserError(f"folder {root} holds no .tar file; give a folder of WebDataset tars")
    listed = []
    for path in paths:
        plain = unpacked(path, scratch)
        found = members(plain, what="archive", long_names=True)
        listed.append((path, plain, [(check_name(m.name, path), m.offset, m.size) for m in found]))
    return _webdataset(listed, image_column)


def unpacked(path: Path, scratch: Path) -> Path:
    """The uncompressed tar: `path` itself, or what it unpacks to, in `scratch`."""
    with path.open("rb") as file:
        start = file.read(6)
    opener = next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), None)
    if opener is None:
        if start.startswith(_ZSTD):
            raise UserError(f"{path} is packed with zstd, which is not read; unpack it with `zstd -d` first")
        return path
    out = scratch / f"{hashlib.sha256(f'{path.name} {stamp(path)}'.encode()).hexdigest()[:24]}.tar"
    if not out.exists():
        with opener(path) as packed:
            unpack(packed, out, path)
    return out


def _webdataset(
    listed: list[tuple[Path, Path, list[tuple[str, int, int]]]], image_column: str | None = None
) -> Source:
    names: list[str] = []
    rows: list[tuple[int, int, int]] = []
    found: dict[str, list[tuple[int, int, int] | None]] = {suffix: [] for suffix in LABEL_SUFFIXES}
    for number, (path, _, content) in enumerate(listed):
        groups: dict[str, dict[str, tuple[int, int]]] = {}
        for name, offset, size in content:
            key, suffix = _split(name)
            groups.setdefault(key, {})[suffix] = (offset, size)
        for key, group in groups.items():
            images = [suffix for suffix in group if suffix in ((image_column,) if image_column else SUFFIXES)]
            if len(images) > 1:
                raise UserError(
                    f"{path}: sample {key!r} holds {len(images)} images ({', '.join(images)}); choose with --image-column"
                )
            if images and is_picture(f"{key}.{images[0]}"):
                names.append(f"{path.name}/{key}.{images[0]}")
                rows.append((number, *group[images[0]]))
                for suffix in LABEL_SUFFIXES:
                    found[suffix].append((number, *group[suffix]) if suffix in group else None)
    if not names:
        raise UserError(f"{listed[0][0]} holds no sample with an image; WebDataset members are called KEY.png, .jpg or .webp")
    plain = [tar for _, tar, _ in listed]
    labels, notes = _webdataset_labels(found, plain, str(listed[0][0]), len(names))
    columns = np.array(rows, np.int64)
    paths = [(path, tar) for path, tar, _ in listed]
    return _flat("webdataset", paths, names, columns[:, 0].astype(np.int32), columns[:, 1], columns[:, 2], labels, notes)


def _webdataset_labels(
    found: dict[str, list[tuple[int, int, int] | None]], tars: list[Path], where: str, count: int
) -> tuple[Labels, tuple[str, ...]]:
    """Labels from the first kind of member that any sample has: .cls, a "label" in .json, .txt."""
    files = Files()
    try:
        for suffix in LABEL_SUFFIXES:
            if not any(found[suffix]):
                continue
            values = [
                None if row is None else _value(_bytes(files, tars[row[0]], *row[1:], MAX_LABEL_BYTES), suffix, where)
                for row in found[suffix]
            ]
            if suffix == "txt" and (2 * len(set(values)) > count or max(len(str(v)) for v in values) > MAX_CLASS_NAME):
                break  # captions
            if any(value is not None for value in values):
                return from_values(values, where), (f"labels are those of the .{suffix} members",)
    finally:
        files.close()
    return (np.full(count, -1, np.int32), ()), ("no labels: no .cls, no label in .json, and .txt holds captions if anything",)


def _value(data: bytes, suffix: str, where: str) -> int | str | None:
    try:
        if suffix == "json":
            content = json.loads(data)
            value = content.get("label") if isinstance(content, dict) else None
        else:
            value = data.decode("utf-8").strip()
            value = int(value) if len(value) < 20 and value.removeprefix("-").isdecimal() else value or None
    except (ValueError, RecursionError):
        raise UserError(f"a .{suffix} member in {where} is not {'JSON' if suffix == 'json' else 'UTF-8'}; correct it") from None
    if isinstance(value, bool) or not isinstance(value, int | str | None):
        raise UserError(f"a .{suffix} member in {where} holds the label {str(value)[:80]!r}; it must be a number or a name")
    return None if value == -1 else value


def _flat(
    kind: str, tars: list[tuple[Path, Path]], names: list[str], file: np.ndarray, offset: np.ndarray, size: np.ndarray,
    labels: Labels, notes: tuple[str, ...],
) -> Source:
    digest = hashlib.sha256(repr([(path.name, stamp(path)) for path, _ in tars]).encode())
    digest.update(f"{len(names)}".encode() + offset.tobytes() + labels[0].tobytes())
    files = tuple(str(plain) for _, plain in tars)

    def part(indices: np.ndarray) -> FlatPart:
        return FlatPart(files, pick(names, indices), file[indices], offset[indices], size[indices])

    return Source(kind, *labels, digest.hexdigest(), part, notes)


def _split(name: str) -> tuple[str, str]:
    """The key and the suffix of a WebDataset member: cut at the first dot of its last part."""
    head, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{head}/{stem}" if head else stem, suffix.lower()


def _is_tar(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(TAR_SUFFIXES)


TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".tar.zst")


def _text(path: Path, offset: int, size: int, cap: int, shown: Path) -> str:
    files = Files()
    try:
        return _bytes(files, path, offset, size, cap).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{LABELS} in {shown} is not UTF-8; save it so") from None
    finally:
        files.close()


def _bytes(files: Files, path: Path, offset: int, size: int, cap: int) -> bytes:
    if size > cap:
        raise UserError(f"a member of {path} that holds labels has {size} bytes, over the cap of {cap}; correct it")
    try:
        return files.read(str(path), offset, size)
    except BadImage as error:
        raise UserError(f"{path}: {error}") from None


