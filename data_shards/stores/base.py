"""What every store does, and the folder on this machine."""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from data_shards.errors import UserError
from data_shards.stores.places import check_name
from data_shards.stores.retries import retried

MAX_READ = 1024**3  # bytes of one read
PART_BYTES = 8 * 1024 * 1024  # of a file that is read in parts

T = TypeVar("T")


@dataclass(frozen=True)
class Store:
    """A folder of files. Frozen and picklable, with no open connection inside: each process makes its own."""

    name: str  # path or URL, for messages
    local: Path | None = None  # the folder, if it lies on this machine
    patience_s: float = 0.0  # for how long at least what may pass is tried again

    def read(self, name: str, start: int = 0, end: int | None = None, *, cap: int = MAX_READ) -> bytes:
        """Returns bytes [start, end) of a file, fewer only where the file ends; `end` None reads to its end.

        Raises `UserError` naming file, range and remedy if the file is missing or cannot be read, and for more than
        `cap` bytes.
        """
        where = self.where(name)
        if start < 0 or (end is not None and end < start):
            raise UserError(f"bytes {start} to {end} of {where} are no range; give 0 <= start <= end")
        if end is not None and end - start > cap:
            raise UserError(f"{end - start} bytes of {where} are over the cap of {cap}; read them in parts")
        if start == end:
            return b""
        span = "" if end is None and not start else f", bytes {start} to {'the end' if end is None else end - 1},"
        data = self._try(f"{where}{span} cannot be read", lambda: self._read(name, start, end, cap))
        if len(data) > cap:
            raise UserError(f"{where} has over {cap} bytes, the cap for a file read whole; give the right file")
        return data

    def parts(self, name: str, size: int) -> Iterator[bytes]:
        """Yields the first `size` bytes of a file, in reads of at most `PART_BYTES`; fewer where it ends before."""
        for start in range(0, size, PART_BYTES):
            yield self.read(name, start, min(start + PART_BYTES, size))

    def size(self, name: str) -> int:
        """Returns the bytes in a file; raises `UserError` if it is missing."""
        where = self.where(name)
        return self._try(f"{where} cannot be read", lambda: self._size(name))

    def exists(self, name: str) -> bool:
        """Whether the file is there; raises `UserError` if that cannot be found out."""
        what = f"{self.where(name)} cannot be looked up"
        try:
            retried(lambda: self._size(name), what, self._remedy(), self.patience_s)
        except FileNotFoundError:
            return False
        return True

    def names(self) -> list[str]:
        """Returns the files of the folder and one level below, sorted, such as "samples/label.npy".

        Files with other names than a set's (`places.check_name`) are left out; a missing folder is empty.
        """
        try:
            found = retried(self._names, f"{self.name} cannot be listed", self._remedy(), self.patience_s)
        except FileNotFoundError:
            return []
        return sorted(name for name in found if _is_name(name))

    def put(self, file: Path, name: str) -> None:
        """Copies a local file to the folder under `name`; it is there whole or not at all."""
        self._try(f"{self.where(name)} cannot be written", lambda: self._put(file, name))

    def write(self, name: str, data: bytes) -> None:
        """Writes a file of these bytes; it is there whole or not at all."""
        self._try(f"{self.where(name)} cannot be written", lambda: self._write(name, data))

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        what = f"{self.where(name)} cannot be removed"
        try:
            retried(lambda: self._remove(name), what, self._remedy(), self.patience_s)
        except FileNotFoundError:
            return

    def where(self, name: str) -> str:
        """The file's path or URL, for messages; raises `UserError` if `name` is not safe."""
        return f"{self.name}/{check_name(name)}"

    def _try(self, what: str, action: Callable[[], T]) -> T:
        try:
            return retried(action, what, self._remedy(), self.patience_s)
        except FileNotFoundError:
            raise UserError(f"{what} (it does not exist); check the address, or fetch or pack the set again") from None

    # What a kind of store provides: plain errors, no retries. `_read` may return more than `cap` bytes to say so.
    def _read(self, name: str, start: int, end: int | None, cap: int) -> bytes:
        raise NotImplementedError

    def _size(self, name: str) -> int:
        raise NotImplementedError

    def _names(self) -> list[str]:
        raise UserError(f"the files of {self.name} cannot be listed; name the files, or give a folder or an object store")

    def _put(self, file: Path, name: str) -> None:
        raise UserError(f"{self.name} cannot be written to; give a folder or an object store")

    def _write(self, name: str, data: bytes) -> None:
        raise UserError(f"{self.name} cannot be written to; give a folder or an object store")

    def _remove(self, name: str) -> None:
        raise UserError(f"{self.name} cannot be written to; give a folder or an object store")

    def _remedy(self) -> str:
        return "check the address and that it may be reached"


@dataclass(frozen=True)
class LocalStore(Store):
    """A folder on this machine."""

    def _path(self, name: str) -> Path:
        assert self.local is not None
        return self.local / name

    def _read(self, name: str, start: int, end: int | None, cap: int) -> bytes:
        # A pipe planted as a file would block for ever without O_NONBLOCK.
        descriptor = os.open(self._path(name), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            self._check_regular(name, os.fstat(descriptor))
            file.seek(start)
            return _read_all(file, cap + 1 if end is None else end - start)

    def _size(self, name: str) -> int:
        status = self._path(name).stat()
        self._check_regular(name, status)
        return status.st_size

    def _names(self) -> list[str]:
        assert self.local is not None
        found = []
        for entry in os.scandir(self.local):
            if entry.is_file():
                found.append(entry.name)
            elif entry.is_dir() and _is_name(entry.name):
                found += [f"{entry.name}/{inner.name}" for inner in os.scandir(entry.path) if inner.is_file()]
        return found

    def _put(self, file: Path, name: str) -> None:
        with file.open("rb") as source:
            self._replace(name, lambda target: shutil.copyfileobj(source, target, 1 << 20))

    def _write(self, name: str, data: bytes) -> None:
        self._replace(name, lambda target: target.write(data))

    def _remove(self, name: str) -> None:
        self._path(name).unlink()

    def _replace(self, name: str, fill: Callable[[BinaryIO], object]) -> None:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.name[:200]}.{uuid.uuid4().hex}.tmp"
        try:
            with temporary.open("xb") as target:
                fill(target)
                target.flush()
                os.fsync(target.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _check_regular(self, name: str, status: os.stat_result) -> None:
        if stat.S_ISDIR(status.st_mode):
            raise FileNotFoundError(name)  # as at an object store, which has no folders
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{self.where(name)} is not a regular file; fetch or pack the set again")

    def _remedy(self) -> str:
        return "check the folder, its permissions and the free space"


def _read_all(file: BinaryIO, size: int) -> bytes:
    """Up to `size` bytes; one read gives at most 2 GiB."""
    parts = []
    while size > 0 and (part := file.read(min(size, 1 << 30))):
        parts.append(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _is_name(name: str) -> bool:
    try:
        check_name(name)
    except UserError:
        return False
    return True
