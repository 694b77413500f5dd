"""Arrays of images in .npy and .npz files: uint8 (N, H, W), (N, H, W, C) or (N, C, H, W), C 1, 3 or 4 (with alpha).

Labels are an integer or string array (N,): in the same .npz, or `labels.npy` beside a .npy. Nothing is unpickled. Arrays
that lie uncompressed in their file are read in place; a compressed one is unpacked into the scratch folder under a cap.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from data_shards.errors import BadImage, UserError
from data_shards.images import MAX_PIXELS
from data_shards.sources.base import Files, Source, check_count, check_total, stamp, unpack
from data_shards.sources.labels import Labels, from_numbers, from_values

MAX_LABEL_BYTES = 1024 * 1024 * 1024
LABEL_NAMES = ("labels", "label", "y")


@dataclass(frozen=True)
class Array:
    """Where an array lies: uncompressed from byte `offset` of `path` on, in C order."""

    path: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass
class RowsPart:
    """Images of an array."""

    array: Array
    name: str
    rows: np.ndarray
    opened: Files = field(default_factory=Files)

    @property
    def names(self) -> list[str]:
        return [f"{self.name}[{row}]" for row in self.rows.tolist()]

    def read(self, number: int) -> Image.Image:
        shape = self.array.shape[1:]
        size = math.prod(shape)
        pixels = np.frombuffer(self.opened.read(self.array.path, self.array.offset + int(self.rows[number]) * size, size),
                               np.uint8).reshape(shape)
        if len(shape) == 3 and _channels_first(shape):
            pixels = pixels.transpose(1, 2, 0)
        if pixels.ndim == 3 and pixels.shape[2] == 1:
            pixels = pixels[:, :, 0]
        return Image.fromarray(np.ascontiguousarray(pixels))

    def close(self) -> None:
        self.opened.close()


def open_arrays(
    path: Path, scratch: Path, image_column: str | None = None, label_column: str | None = None
) -> Source:
    """The images of a .npy or .npz file; columns name the arrays to take from an .npz where that is not plain.

    Raises `UserError` for arrays that are no uint8 images, labels that do not fit, pickles, and absurd claims.
    """
    found = _in_npz(path) if path.suffix.lower() == ".npz" else {path.stem: path.stem}
    with zipfile.ZipFile(path) if path.suffix.lower() == ".npz" else _Nothing() as archive:
        heads = {name: _header(path, archive, member) for name, member in found.items()}
        images = _choose_images(path, {name: head[0] for name, head in heads.items()}, image_column)
        shape, dtype, _ = heads[images]
        _check_images(path, images, shape, dtype)
        label = _choose_labels(path, heads, shape[0], images, label_column)
        array = _in_place(path, archive, found[images], heads[images], scratch)
        if label is None:
            labels, where = np.full(shape[0], -1, np.int32), ""
            classes: tuple[str, ...] = ()
        else:
            values, where = _load_labels(path, archive, found, label, shape[0])
            labels, classes = _as_labels(values, where)
    digest = hashlib.sha256(f"{stamp(path)} {images} {shape}".encode() + labels.tobytes()).hexdigest()

    def part(indices: np.ndarray) -> RowsPart:
        return RowsPart(array, images, indices)

    notes = (f"images are {images} {shape}, labels {where or 'none'}",)
    return Source("arrays", labels, classes, digest, part, notes, numbered=True)


class _Nothing:
    """Stands for the archive of an array that is in none."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def _in_npz(path: Path) -> dict[str, str]:
    """Array names -> member names."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.flag_bits & 0x41 for member in members):
            raise UserError(f"{path} is encrypted; save it with numpy.savez")
        check_total(sum(member.file_size for member in members), path)
        return {member.filename.removesuffix(".npy"): member.filename for member in members if member.filename.endswith(".npy")}


def _header(path: Path, archive: zipfile.ZipFile | None, member: str) -> tuple[tuple[int, ...], np.dtype, int]:
    """(shape, dtype, bytes before the data) of an array, checked against the bytes that there are."""
    if archive is None:
        with path.open("rb") as file:
            head, size = _read_header(file, path), path.stat().st_size
    else:
        with archive.open(member) as stream:
            head, size = _read_header(stream, path), archive.getinfo(member).file_size  # type: ignore[arg-type]
    shape, dtype, start = head
    if start + math.prod(shape) * dtype.itemsize != size:
        raise UserError(f"{path} is damaged: {member!r} says it is {dtype} {shape}, and its {size} bytes are not; save it anew")
    return head


def _read_header(file: BinaryIO, path: Path) -> tuple[tuple[int, ...], np.dtype, int]:
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise UserError(f"{path} is of the npy version {version}, which is not read; save it anew with numpy.save")
    try:
        shape, fortran, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(file)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # numpy parses the header as Python's tokenizer does, with all of its errors
        raise ValueError(f"its header is damaged: {error}") from None
    if dtype.hasobject:
        raise UserError(f"{path} holds Python objects, which are not read from a file; save plain uint8 and integer arrays")
    if fortran and len(shape) > 1:
        raise UserError(f"{path} is in Fortran order; save numpy.ascontiguousarray of it")
    return shape, dtype, file.tell()


def _choose_images(path: Path, shapes: dict[str, tuple[int, ...]], column: str | None) -> str:
    if column is not None and column not in shapes:
        raise UserError(f"{path} holds no array {column!r}; its arrays: {', '.join(shapes) or 'none'}")
    candidates = [column] if column else [name for name, shape in shapes.items() if len(shape) in (3, 4)]
    if len(candidates) != 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise UserError(f"{path} holds {len(candidates)} arrays of images ({listed}); name one with --image-column")
    return candidates[0]


def _check_images(path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if dtype != np.uint8:
        raise UserError(f"the images {name} in {path} are {dtype}; save them as uint8 with values 0 to 255")
    channels_last = len(shape) == 4 and shape[3] in (1, 3, 4)
    if len(shape) not in (3, 4) or (len(shape) == 4 and not channels_last and not _channels_first(shape[1:])):
        raise UserError(f"the images {name} in {path} are {shape}; (N, H, W), (N, H, W, C) or (N, C, H, W) is needed, C 1 or 3")
    if channels_last and shape[1] in (1, 3):
        raise UserError(f"the images {name} in {path} are {shape}, where either side may be the channels; save (N, H, W)")
    if min(shape[1:]) < 1 or math.prod(shape[1:]) > 4 * MAX_PIXELS:
        raise UserError(f"the images {name} in {path} are {shape}; an image has 1 to {MAX_PIXELS} pixels")
    check_count(shape[0], path)


def _channels_first(shape: tuple[int, ...]) -> bool:
    return shape[2] not in (1, 3, 4) and shape[0] in (1, 3, 4)


def _choose_labels(
    path: Path, heads: dict[str, tuple[tuple[int, ...], np.dtype, int]], count: int, images: str, column: str | None
) -> str | None:
    if path.suffix.lower() != ".npz":
        file = path.with_name(column or "labels.npy")
        if column and not file.is_file():
            raise UserError(f"there is no file {file} with the labels of {path.name}; put it there, or use no --label-column")
        return file.name if file.is_file() and file != path else None
    fitting = [name for name, (shape, _, _) in heads.items() if shape in ((count,), (count, 1)) and name != images]
    if column is not None:
        if column not in fitting:
            raise UserError(f"{path} holds no labels {column!r} of {count} images; arrays of that length: {fitting or 'none'}")
        return column
    named = [name for name in fitting if name.lower() in LABEL_NAMES]
    chosen = fitting if len(fitting) == 1 else named
    if fitting and len(chosen) != 1:
        raise UserError(f"{path} holds {len(fitting)} arrays that may be labels ({', '.join(fitting)}); use --label-column")
    return chosen[0] if chosen else None


def _load_labels(
    path: Path, archive: zipfile.ZipFile | None, found: dict[str, str], name: str, count: int
) -> tuple[np.ndarray, str]:
    if archive is None:
        beside = path.with_name(name)
        with beside.open("rb") as file:
            shape, dtype, start = _read_header(file, beside)
            size = beside.stat().st_size
            if shape not in ((count,), (count, 1)) or start + count * dtype.itemsize != size or size > MAX_LABEL_BYTES:
                raise UserError(f"{beside} is {dtype} {shape}, not one label for each of the {count} images of {path.name}")
            return np.fromfile(file, dtype, count), str(beside)
    info = archive.getinfo(found[name])
    if info.file_size > MAX_LABEL_BYTES:
        raise UserError(f"the labels {name} in {path} have {info.file_size} bytes, over the cap of {MAX_LABEL_BYTES}")
    with archive.open(info) as stream:
        _, dtype, start = _read_header(stream, path)  # type: ignore[arg-type]
        return np.frombuffer(stream.read(info.file_size - start), dtype), f"{path}:{name}"


def _as_labels(values: np.ndarray, where: str) -> Labels:
    if values.dtype.kind in "US":
        text = values.astype(str) if values.dtype.kind == "S" else values
        return from_values(text.tolist(), where)
    return from_numbers(values, where)


def _in_place(
    path: Path, archive: zipfile.ZipFile | None, member: str, head: tuple[tuple[int, ...], np.dtype, int], scratch: Path
) -> Array:
    shape, dtype, start = head
    if archive is None:
        return Array(str(path), start, shape, dtype)
    info = archive.getinfo(member)
    if info.compress_type == zipfile.ZIP_STORED:
        # The member's bytes begin behind its local header, whose extra field the directory does not know.
        files = Files()
        try:
            local = files.read(str(path), info.header_offset, 30)
        except BadImage as error:
            raise UserError(f"{path}: {error}") from None
        finally:
            files.close()
        name, extra = int.from_bytes(local[26:28], "little"), int.from_bytes(local[28:30], "little")
        return Array(str(path), info.header_offset + 30 + name + extra + start, shape, dtype)
    out = scratch / f"{hashlib.sha256(f'{path.name} {member} {stamp(path)}'.encode()).hexdigest()[:24]}.npy"
    if not out.exists():
        with archive.open(member) as packed:
            unpack(packed, out, path)
    return Array(str(out), start, shape, dtype)
