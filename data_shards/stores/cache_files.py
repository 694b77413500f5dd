"""The files of a local cache: shared by processes, bounded, and never trusted further than it was checked.

    data/ab/<key>    the content; appears by rename, so that it is whole
    tmp/             files being written; those whose writer died are swept
    locks/           a fixed number of files to lock, none of them ever removed

A lock belongs to an open file, so that the kernel ends it with its process, however that ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from data_shards.errors import UserError

CACHE_BYTES = 20 * 10**9
LOCKS = 1024
LOCK_WAIT_S = 300.0
MIN_AGE_S = 5.0  # a younger file is not evicted: somebody may be about to open it
ORPHAN_AGE_S = 60.0
_FULL = (errno.ENOSPC, errno.EDQUOT)

# Bytes stored by this process since it last counted the whole cache.
_uncounted: dict[Path, int] = {}


@dataclass(frozen=True)
class Cache:
    """A cache folder and the bytes it may hold; files in use or seconds old are kept even above that."""

    root: Path
    cap: int

    def path(self, key: str) -> Path:
        """The file of a key, which is made of hexadecimal digits and dashes."""
        return self.root / "data" / key[:2] / key


def open_cache(folder: str | os.PathLike[str] | None = None, cap: int | None = None) -> Cache:
    """Returns the cache in `folder`, made if missing, that may hold `cap` bytes.

    Defaults: GRAFT_CACHE or ~/.cache/graft/shards, and GRAFT_CACHE_BYTES or 20 GB. Raises `UserError` if the folder
    cannot be written, belongs to somebody else, or others may write to it (they could plant what training reads).
    """
    if cap is None:
        text = os.environ.get("GRAFT_CACHE_BYTES") or str(CACHE_BYTES)
        if not text.isdigit() or not int(text):
            raise UserError(f"GRAFT_CACHE_BYTES is {text!r}; give a number of bytes such as {CACHE_BYTES}")
        cap = int(text)
    try:
        root = Path(folder or os.environ.get("GRAFT_CACHE") or Path.home() / ".cache" / "graft" / "shards").absolute()
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = root.stat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise UserError(f"others may write to the cache folder {root}; set GRAFT_CACHE to a folder of your own")
        for name in ("data", "tmp", "locks"):
            (root / name).mkdir(mode=0o700, exist_ok=True)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the cache folder cannot be made ({reason}); set GRAFT_CACHE to a folder that can") from None
    return Cache(root, cap)


@contextmanager
def locked(cache: Cache, key: str) -> Iterator[None]:
    """Holds the lock of a key against other threads and processes.

    A holder that dies frees it; one that hangs for `LOCK_WAIT_S` seconds is not waited for any longer, since storing
    the same content twice does no harm.
    """
    path = cache.root / "locks" / f"{zlib.crc32(key.encode()) % LOCKS:03x}"
    if not path.parent.is_dir():
        open_cache(cache.root, cache.cap)  # somebody emptied it
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unwritable(cache, error) from None
    try:
        until, wait = time.monotonic() + LOCK_WAIT_S, 0.001
        while not _lock(descriptor, fcntl.LOCK_EX) and time.monotonic() < until:
            time.sleep(wait)
            wait = min(wait * 1.5, 0.05)
        yield
    finally:
        # A process forked meanwhile shares the open file: closing ours would leave it locked.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def open_cached(cache: Cache, key: str, size: int) -> int | None:
    """Returns a descriptor of a cached file of exactly `size` bytes, marked as used; None if there is none.

    Whatever else has its name (a file of another length or owner, a link) is removed.
    """
    path = cache.path(key)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError:
        _discard(path)
        return None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size != size or status.st_uid != os.geteuid():
        os.close(descriptor)
        _discard(path)
        return None
    _lock(descriptor, fcntl.LOCK_SH)  # held as long as it is open: eviction passes it over
    with suppress(OSError):
        os.utime(descriptor)
    return descriptor


@contextmanager
def new_file(cache: Cache, key: str) -> Iterator[int]:
    """Yields the descriptor of a new, empty file, closed and renamed to its key when the block ends without an error."""
    temporary = cache.root / "tmp" / uuid.uuid4().hex
    descriptor = -1
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        _lock(descriptor, fcntl.LOCK_SH)
        yield descriptor
        size = os.fstat(descriptor).st_size
        path = cache.path(key)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(cache, error) from None
    finally:
        with suppress(OSError):
            temporary.unlink()
        if descriptor >= 0:
            os.close(descriptor)
    _uncounted[cache.root] = _uncounted.get(cache.root, cache.cap) + size
    if _uncounted[cache.root] > cache.cap // 100:
        _uncounted[cache.root] = 0
        evict(cache, cache.cap)


def write_all(cache: Cache, descriptor: int, data: bytes) -> None:
    """Writes all bytes; on a full disk it makes room once, by half of the cache, before it raises `UserError`."""
    view, made_room = memoryview(data), False
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except OSError as error:
            if error.errno not in _FULL or made_room:
                raise _unwritable(cache, error) from None
            made_room = True
            evict(cache, cache.cap // 2)


def evict(cache: Cache, target: int) -> None:
    """Removes the files that were opened longest ago until the cache holds at most about `target` bytes.

    Files that are open somewhere or were used in the last `MIN_AGE_S` seconds stay, so that a cap smaller than what is
    being read slows the reading down but does not stop it.
    """
    with suppress(OSError, UserError):
        descriptor = os.open(cache.root / "locks" / "evict", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if _lock(descriptor, fcntl.LOCK_EX):  # else somebody is at it
                _evict(cache, target)
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)


def remove_cached(cache: Cache, key: str) -> None:
    """Removes a cached file, if it is there."""
    _discard(cache.path(key))


def _evict(cache: Cache, target: int) -> None:
    now = time.time()
    for entry in os.scandir(cache.root / "tmp"):
        with suppress(FileNotFoundError):
            if now - entry.stat(follow_symlinks=False).st_mtime > ORPHAN_AGE_S:
                _remove_unused(entry.path)
    files = []
    for folder in os.scandir(cache.root / "data"):
        for entry in os.scandir(folder.path) if folder.is_dir(follow_symlinks=False) else ():
            with suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                files.append((status.st_mtime, status.st_size, entry.path))
    total = sum(size for _, size, _ in files)
    if total <= target:
        return
    for used, size, path in sorted(files):
        # A little below the target, so that the next file stored does not come here at once. A clock set back makes
        # files look as if they came from the future; those are as old as any.
        if total <= target * 0.95 or 0 <= now - used < MIN_AGE_S:
            break
        if _remove_unused(path):
            total -= size


def _remove_unused(path: str) -> bool:
    """Removes a file unless somebody has it open; returns whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:
        return _discard(Path(path))
    try:
        return _lock(descriptor, fcntl.LOCK_EX) and _discard(Path(path))
    finally:
        os.close(descriptor)


def _discard(path: Path) -> bool:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} in the cache cannot be removed ({error.strerror}); remove it by hand") from None
    return True


def _lock(descriptor: int, kind: int) -> bool:
    """Tries a lock; on a file system without locks everybody has it, and work is done twice at worst."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _unwritable(cache: Cache, error: OSError) -> UserError:
    if error.errno in _FULL:
        return UserError(
            f"the disk of the cache {cache.root} is full; free some space, lower GRAFT_CACHE_BYTES (now {cache.cap}), or"
            " set GRAFT_CACHE to a folder on a larger disk"
        )
    return UserError(f"the cache {cache.root} cannot be written ({error.strerror}); set GRAFT_CACHE to a folder that can")
