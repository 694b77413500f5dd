"""A folder of images: the classes are its subfolders, or stand in `labels.csv`, or there are none."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_shards.errors import BadImage, UserError
from data_shards.images import FORMATS, MAX_BYTES
from data_shards.sources.base import Source, check_format, is_picture, pick, stamp
from data_shards.sources.labels import LABELS, from_names


@dataclass
class FolderPart:
    """Image files under `root`."""

    root: str
    names: list[str]

    def read(self, number: int) -> bytes:
        name = self.names[number]
        check_format(name)
        try:
            # A pipe would block, were it opened as a file is.
            descriptor = os.open(os.path.join(self.root, name), os.O_RDONLY | os.O_NONBLOCK)
            with open(descriptor, "rb", buffering=0) as file:
                status = os.fstat(descriptor)
                if status.st_mode & 0o170000 != 0o100000 or status.st_size > MAX_BYTES:
                    raise BadImage(f"it is no plain file of at most {MAX_BYTES} bytes")
                return file.read(status.st_size)
        except OSError as error:
            raise BadImage(f"it cannot be read ({error.strerror})") from None

    def close(self) -> None:
        """Nothing stays open."""


def open_folder(root: Path) -> Source:
    """Lists the pictures under `root` in the order of their names; hidden files and folders are passed over.

    Raises `UserError` for an unreadable folder, one without images, or labels that do not fit.
    """
    found = _listed(str(root))
    if not found:
        raise UserError(f"folder {root} holds no image; put {', '.join(FORMATS)} files into it or its subfolders")
    found.sort()
    digest = hashlib.sha256()
    for name, size, time in found:
        digest.update(f"{name}\0{size}\0{time}\n".encode("utf-8", "surrogateescape"))
    names = [name for name, _, _ in found]
    table = root / LABELS
    if table.is_file():
        digest.update(stamp(table).encode())
        try:
            with table.open(newline="", encoding="utf-8-sig") as lines:
                labels, classes = from_names(names, lines, str(root))
        except OSError as error:
            raise UserError(f"{table} cannot be read ({error.strerror}); check its permissions") from None
    else:
        labels, classes = from_names(names, None, f"folder {root}")

    def part(indices: np.ndarray) -> FolderPart:
        return FolderPart(str(root), pick(names, indices))

    return Source("folder", labels, classes, digest.hexdigest(), part)


def _listed(root: str) -> list[tuple[str, int, int]]:
    """(relative POSIX path, bytes, time of change in ns) of every picture."""
    found: list[tuple[str, int, int]] = []
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    name = f"{folder}{entry.name}"
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(f"{name}/")
                    elif is_picture(entry.name):
                        status = entry.stat(follow_symlinks=False)
                        found.append((name, status.st_size, status.st_mtime_ns))
        except OSError as error:
            raise UserError(f"folder {error.filename} cannot be read ({error.strerror}); check its permissions") from None
    return found
