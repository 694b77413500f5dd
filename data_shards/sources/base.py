"""What a source of images is, and the caps for those that are not trusted (all of them, but for Python's own arrays).

A source lists its items cheaply, as columns where it can, in an order that depends on nothing but its content. Packing
cuts the list into parts; a part is small, can be pickled, and reads its items in any process, opening files when the
first one is asked for.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from PIL import Image

from data_shards.errors import BadImage, UserError
from data_shards.files import sync
from data_shards.images import FORMATS, MAX_BYTES, SUFFIXES

MAX_ITEMS = 100_000_000
RATIO, SLACK = 100, 16 * 1024 * 1024  # what a compressed file may hold: RATIO times its own bytes, and SLACK
OPEN_FILES = 64  # that a part keeps open
# Pictures in other formats are someone's data: they are counted as bad, where a text file is passed over.
OTHER_PICTURES = ("bmp", "gif", "tif", "tiff", "jp2", "avif", "heic", "svg", "eps", "pdf", "ppm", "pgm", "tga", "ico")
_PICTURES = frozenset(SUFFIXES + OTHER_PICTURES)

# An item as it is read: the bytes of an image file, a picture, or a finished uint8 (C, H, W) array, alone or with the
# label that its maker gave it.
Content = bytes | Image.Image | np.ndarray | tuple[np.ndarray, int]
MapFn = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


class Part(Protocol):
    """Some items of a source."""

    @property
    def names(self) -> Sequence[str]:
        """What the user knows each item by."""

    def read(self, number: int) -> Content:
        """The item in that place of `names`; raises `BadImage` with the reason if there is none to be had."""

    def close(self) -> None:
        """Closes what reading has opened."""


@dataclass(frozen=True)
class Source:
    """All items of a source, in order."""

    kind: str
    labels: np.ndarray  # int32 (N,), index into classes, -1 where there is none or only reading tells it
    classes: tuple[str, ...]
    fingerprint: str  # changes when the items, their order or their labels do
    part: Callable[[np.ndarray], Part]  # of the items with these indices
    notes: tuple[str, ...] = ()  # what a user should know before packing
    keys: Sequence[str] | None = None  # of the samples; made of numbers and names if None
    splits: np.ndarray | None = None  # uint8 (N,), index into the manifest's SPLITS, where they are given
    numbered: bool = False  # whether the names are no more than numbers
    # Writes what cannot be read at random into a folder, and returns the source that reads it from there.
    stage: Callable[[Path, MapFn], Source] | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class FlatPart:
    """Items that lie in files as they are: `size` bytes at `offset` of the file with that number."""

    files: tuple[str, ...]
    names: list[str]
    file: np.ndarray
    offset: np.ndarray
    size: np.ndarray  # -1: the item has no bytes, -2: it is over the cap
    opened: Files = field(default_factory=lambda: Files())

    def read(self, number: int) -> bytes:
        check_format(self.names[number])
        size = int(self.size[number])
        if size == -1:
            raise BadImage("it holds no bytes of an image; a path or a URL is not followed")
        check_size(size if size >= 0 else MAX_BYTES + 1)
        return self.opened.read(self.files[self.file[number]], int(self.offset[number]), size)

    def close(self) -> None:
        self.opened.close()


@dataclass
class Files:
    """A few open files, read by offset; empty again after pickling."""

    stack: ExitStack = field(default_factory=ExitStack)
    descriptors: dict[str, int] = field(default_factory=dict)

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Exactly so many bytes; raises `BadImage` where there are fewer."""
        try:
            if path not in self.descriptors:
                if len(self.descriptors) == OPEN_FILES:
                    self.close()
                descriptor = os.open(path, os.O_RDONLY)
                self.stack.callback(os.close, descriptor)
                self.descriptors[path] = descriptor
            # pread, as a forked process shares its parent's place in the file.
            data = os.pread(self.descriptors[path], size, offset)
            while len(data) < size and (more := os.pread(self.descriptors[path], size - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise BadImage(f"it cannot be read ({error.strerror})") from None
        if len(data) < size:
            raise BadImage(f"its file ends {size - len(data)} bytes before it does")
        return data

    def close(self) -> None:
        self.stack.close()
        self.descriptors.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, _state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]


def is_picture(name: str) -> bool:
    """Whether a file name is that of an image, in a format that is read or in another; hidden files are not."""
    if name.rpartition(".")[2].lower() not in _PICTURES or name[0] == ".":
        return False
    return "/" not in name or not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def check_format(name: str) -> None:
    """Raises `BadImage` for a file name with the suffix of an image format that is not read."""
    if name.rpartition(".")[2].lower() in OTHER_PICTURES:
        raise BadImage(f"its format is not one of {', '.join(FORMATS)}; convert it")


def check_size(size: int) -> None:
    """Raises `BadImage` for an image file of too many bytes."""
    if size > MAX_BYTES:
        raise BadImage(f"it has over {MAX_BYTES} bytes, the cap of an image file")


def check_name(name: str, where: Path) -> str:
    """Returns a member's name if it stays inside its archive; raises `UserError` otherwise."""
    if name.startswith(("/", "~")) or "\\" in name or ".." in name.split("/") or not name.isprintable():
        raise UserError(
            f"{where} holds the unsafe name {name[:80]!r}; names must be relative, without '..', backslashes or control"
            " characters, so make the archive anew"
        )
    return name.removeprefix("./")


def check_total(total: int, path: Path) -> None:
    """Raises `UserError` if a file claims or is found to hold absurdly more than its own size."""
    size = path.stat().st_size
    if total > RATIO * size + SLACK:
        raise UserError(
            f"{path} of {size} bytes would unpack to over {RATIO} times as much, as a bomb does; unpack it yourself if you"
            " trust it, and give the folder"
        )


def unpack(packed: IO[bytes], out: Path, path: Path) -> None:
    """Writes what `packed`, opened from the file at `path`, holds to `out`, whole or not at all.

    Raises `UserError` as soon as it is absurdly more than the file's own size.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary, total = out.with_suffix(".partial"), 0
    with temporary.open("wb") as plain:
        while chunk := packed.read(1 << 20):
            total += len(chunk)
            check_total(total, path)
            plain.write(chunk)
    sync(temporary)
    os.replace(temporary, out)


def check_count(count: int, path: Path) -> int:
    """Returns the number of items of a file; raises `UserError` if it cannot be one."""
    if not 0 < count <= min(MAX_ITEMS, RATIO * path.stat().st_size):
        raise UserError(f"{path} claims to hold {count} images; a source has 1 to {MAX_ITEMS}, each with bytes of its own")
    return count


def stamp(path: Path) -> str:
    """Size and time of a file: changes when it does."""
    status = path.stat()
    return f"{status.st_size}.{status.st_mtime_ns}"


def pick(values: Sequence[str], indices: np.ndarray) -> list[str]:
    """The strings in those places."""
    return [values[index] for index in indices.tolist()]


def crc(data: np.ndarray) -> str:
    """A short mark of an array's bytes, for fingerprints."""
    return f"{zlib.crc32(np.ascontiguousarray(data).tobytes()):08x}"
