"""A local cache of what was read from a store: each part of a shard is fetched once per machine.

Content is immutable and named by its sha256, never by a file's name alone, so that two sets with equal names cannot be
mixed up. A shard larger than a chunk cannot be hashed from a part of it; its chunks are therefore kept apart for each
store that they came from, so that a set from one address cannot plant bytes for a set from another. Who reads samples
checks their CRC, and calls `ChunkReader.forget` to have damaged ones fetched anew.
"""

from __future__ import annotations

import hashlib
import os
import queue
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from data_shards.errors import DamagedShard, UserError
from data_shards.files import hash_file
from data_shards.stores.base import Store
from data_shards.stores.cache_files import Cache, locked, new_file, open_cache, open_cached, remove_cached, write_all

CHUNK_BYTES = 4 * 1024 * 1024
PART_BYTES = 8 * 1024 * 1024  # of a whole file, in one request
OPEN_FILES = 128
THREADS = 4

Key = tuple[str, int]  # a shard's sha256 and the number of the chunk
Range = tuple[str, str, int, int, int]  # a shard's name, sha256 and size, and the bytes from start to end


def cached_file(store: Store, name: str, sha256: str, size: int, cache: Cache | None = None) -> Path:
    """Returns a local file with the content of `name`, whole and with that sha256; in the cache unless it is local.

    Its hash is checked at each call. Open it soon: a file that nobody has open may be evicted, and can be read to its
    end by those who have.

    Raises `DamagedShard` naming the file if its bytes are others, and `UserError` if it cannot be read or kept.
    """
    if store.local is not None:
        path = store.local / name
        if store.size(name) != size or hash_file(path) != sha256:
            raise _other_hash(store, name, size)
        return path
    cache = cache or open_cache()
    if size > cache.cap:
        raise UserError(f"{store.where(name)} has {size} bytes, over the cache's {cache.cap}; raise GRAFT_CACHE_BYTES")
    with locked(cache, sha256):
        if not _holds(cache, sha256, size):
            _download(store, name, sha256, size, cache)
    return cache.path(sha256)


class ChunkReader:
    """Reads ranges of immutable files through the cache, or straight from a local store.

    Usable by many threads, and after a fork in the child. Files of chunks stay open, the `open_files` last used ones,
    so that reading a cached sample is one system call.
    """

    _workers: list[threading.Thread]

    def __init__(
        self,
        store: Store,
        cache: Cache | None = None,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        open_files: int = OPEN_FILES,
        threads: int = THREADS,
    ) -> None:
        assert chunk_bytes > 0 and open_files > 1 and threads > 0
        self.store = store
        self.cache = cache if cache or store.local is not None else open_cache()
        # A local file needs no parts: it is opened once.
        self.chunk_bytes = chunk_bytes if store.local is None else sys.maxsize
        self.open_files = open_files
        self.threads = threads
        self._scope = hashlib.sha256(store.name.encode()).hexdigest()[:16]
        self._files: OrderedDict[Key, _Open] = OrderedDict()
        self._verified: dict[str, int] = {}  # inode by sha256, of files whose hash was found right
        self._start_afresh()
        self._reset_counts()
        _readers.add(self)

    def read(self, name: str, sha256: str, size: int, start: int, end: int) -> bytes:
        """Returns bytes [start, end) of the file `name`, which has `size` bytes and that sha256.

        Raises `DamagedShard` naming file and byte if the store's file is shorter or, where it is one chunk, has another
        hash, and `UserError` if it cannot be read or kept.
        """
        key = (sha256, start // self.chunk_bytes)
        file = self._files.get(key)
        if file is not None and end <= file.end:
            data = os.pread(file.descriptor, end - start, start - file.start)
            if len(data) == end - start:
                self._hits += 1
                try:  # noqa: SIM105 (suppress would double the time of a read)
                    self._files.move_to_end(key)
                except KeyError:  # another thread needed the place
                    pass
                return data
        return self._read(name, sha256, size, start, end)

    def prefetch(self, ranges: Iterable[Range]) -> None:
        """Begins to fetch what will be read soon, in a few threads; an error is raised by the later `read`.

        At most half of `open_files` chunks are under way or waiting; what is over that is left to `read`.
        """
        for name, sha256, size, start, end in ranges:
            for number in range(start // self.chunk_bytes, -(-end // self.chunk_bytes)):
                key = (sha256, number)
                if key in self._files or len(self._jobs) >= self.open_files // 2:
                    continue
                self._failed.pop(key, None)
                job = _Job(name, size)
                if self._jobs.setdefault(key, job) is job:
                    self._waiting[key] = job
                    self._queue.put(key)
        if self._waiting and not self._workers:
            arguments = (weakref.ref(self), self._queue)
            self._workers = [threading.Thread(target=_work, args=arguments, daemon=True) for _ in range(self.threads)]
            for worker in self._workers:
                worker.start()

    def forget(self, sha256: str, start: int = 0, end: int | None = None) -> None:
        """Drops the chunks that hold bytes [start, end) of a file (None: the one that holds `start`), here and on disk.

        For bytes that turned out damaged: the next read fetches them anew. A chunk that another process has replaced
        meanwhile stays.
        """
        for number in range(start // self.chunk_bytes, max(start, (end or 0) - 1) // self.chunk_bytes + 1):
            with self._changing:
                file = self._files.pop((sha256, number), None)
            self._verified.pop(sha256, None)
            if self.cache is None:
                continue
            for key in (sha256, self._name(sha256, number)):
                path = self.cache.path(key)
                if file is None or (path.exists() and path.stat().st_ino == file.inode):
                    remove_cached(self.cache, key)

    def stats(self) -> dict[str, int]:
        """This process's counts: `bytes_fetched` and `requests` at the store, `hits` and `misses` of chunks."""
        return {"bytes_fetched": self._bytes, "requests": self._requests, "hits": self._hits, "misses": self._misses}

    def close(self) -> None:
        """Closes the files and ends the threads; the reader may be used again after that."""
        for _ in self._workers:
            self._queue.put(None)
        self._start_afresh()
        self._files = OrderedDict()

    def __enter__(self) -> ChunkReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        for _ in getattr(self, "_workers", ()):
            self._queue.put(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (self.store, self.cache, self.chunk_bytes, self.open_files, self.threads)

    def _reset_counts(self) -> None:
        self._bytes = self._requests = self._hits = self._misses = 0

    def _start_afresh(self) -> None:
        """What must not outlive a fork: threads, and what they had promised to do."""
        self._jobs: dict[Key, _Job] = {}
        self._waiting: dict[Key, _Job] = {}
        self._failed: dict[Key, UserError] = {}
        self._queue: queue.SimpleQueue[Key | None] = queue.SimpleQueue()
        self._workers = []
        self._changing = threading.Lock()

    def _read(self, name: str, sha256: str, size: int, start: int, end: int) -> bytes:
        if not 0 <= start <= end <= size:
            raise DamagedShard(
                f"shard {self.store.where(name)} has {size} bytes, and bytes {start} to {end} were asked for; index or fetch"
                " the set again"
            )
        parts = []
        while start < end:
            number = start // self.chunk_bytes
            stop = min(end, (number + 1) * self.chunk_bytes)
            parts.append(self._part(name, sha256, size, number, start, stop))
            start = stop
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _part(self, name: str, sha256: str, size: int, number: int, start: int, stop: int) -> bytes:
        for _ in range(2):
            file = self._file(name, sha256, size, number)
            data = os.pread(file.descriptor, stop - start, start - file.start)
            if len(data) == stop - start:
                return data
            self.forget(sha256, start)  # somebody cut the cached file
        raise _damaged(self.store, name, start + len(data), "its bytes end there")

    def _file(self, name: str, sha256: str, size: int, number: int) -> _Open:
        """The open file of a chunk, from whoever has it."""
        key = (sha256, number)
        job = self._jobs.get(key)
        # A job that no thread has begun is done here: it may stand behind many others.
        if job is not None and self._waiting.pop(key, None) is None:
            job.done.wait()
        elif job is not None:
            self._jobs.pop(key, None)
            job.done.set()
        if error := self._failed.pop(key, None):
            raise error
        file = self._files.get(key)
        if file is not None:
            self._hits += 1
            return file
        return self._keep(key, self._load(name, sha256, size, number))

    def _keep(self, key: Key, file: _Open) -> _Open:
        # Closing lets other threads run, so nothing may be closed while the dictionary changes; hence `dropped`.
        dropped = []
        with self._changing:
            file = self._files.setdefault(key, file)
            while len(self._files) > self.open_files:
                dropped.append(self._files.popitem(last=False))
        return file

    def _load(self, name: str, sha256: str, size: int, number: int) -> _Open:
        if self.store.local is not None:
            return self._load_local(name, size)
        assert self.cache is not None
        start = number * self.chunk_bytes
        end = min(size, start + self.chunk_bytes)
        key = sha256 if end - start == size else self._name(sha256, number)
        if found := self._cached(key, start, end):
            self._hits += 1
            return found
        with locked(self.cache, key):
            if found := self._cached(key, start, end):
                self._hits += 1
                return found
            data = self.store.read(name, start, end)
            with self._changing:
                self._misses += 1
                self._requests += 1
                self._bytes += len(data)
            if len(data) != end - start:
                raise _damaged(self.store, name, start + len(data), f"it ends there, where its manifest says byte {size}")
            if key == sha256 and hashlib.sha256(data).hexdigest() != sha256:
                raise _other_hash(self.store, name, size)
            with new_file(self.cache, key) as descriptor:
                write_all(self.cache, descriptor, data)
                file = _Open(os.dup(descriptor), start, end)
            if key == sha256:
                self._verified[sha256] = file.inode
            return file

    def _load_local(self, name: str, size: int) -> _Open:
        found = self.store.size(name)  # of a regular file
        if found != size:
            raise _damaged(self.store, name, min(found, size), f"it has {found} bytes where its manifest says {size}")
        assert self.store.local is not None
        return _Open(os.open(self.store.local / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), 0, size)

    def _cached(self, key: str, start: int, end: int) -> _Open | None:
        assert self.cache is not None
        descriptor = open_cached(self.cache, key, end - start)
        if descriptor is None:
            return None
        file = _Open(descriptor, start, end)
        if "-" not in key and self._verified.get(key) != file.inode:
            if hashlib.sha256(os.pread(descriptor, end, 0)).hexdigest() != key:
                remove_cached(self.cache, key)
                return None
            self._verified[key] = file.inode
        return file

    def _name(self, sha256: str, number: int) -> str:
        return f"{sha256}-{self._scope}-{self.chunk_bytes:x}-{number:x}"


class _Open:
    """An open file that holds bytes [start, end) of a shard; closed when nobody refers to it any more."""

    __slots__ = ("descriptor", "end", "inode", "start")

    def __init__(self, descriptor: int, start: int, end: int) -> None:
        self.descriptor, self.start, self.end = descriptor, start, end
        self.inode = os.fstat(descriptor).st_ino

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound here: `os` may be gone at exit
        close(self.descriptor)


class _Job:
    """A chunk to fetch in the background."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size, self.done = name, size, threading.Event()


_readers: weakref.WeakSet[ChunkReader] = weakref.WeakSet()


def _after_fork() -> None:
    for reader in list(_readers):
        reader._start_afresh()
        reader._reset_counts()


os.register_at_fork(after_in_child=_after_fork)


def _remake(store: Store, cache: Cache | None, chunk_bytes: int, open_files: int, threads: int) -> ChunkReader:
    return ChunkReader(store, cache, chunk_bytes=chunk_bytes, open_files=open_files, threads=threads)


def _work(reference: weakref.ref[ChunkReader], keys: queue.SimpleQueue[Key | None]) -> None:
    while (key := keys.get()) is not None:
        reader = reference()
        if reader is None:
            return
        job = reader._waiting.pop(key, None)
        if job is not None:
            try:
                reader._keep(key, reader._load(job.name, key[0], job.size, key[1]))
            except UserError as error:
                reader._failed[key] = error
            except Exception as error:
                reader._failed[key] = UserError(f"{reader.store.where(job.name)} cannot be read ({error!r}); report this")
            finally:
                reader._jobs.pop(key, None)
                job.done.set()
        del reader  # so that it may end while this thread waits


def _holds(cache: Cache, sha256: str, size: int) -> bool:
    descriptor = open_cached(cache, sha256, size)
    if descriptor is None:
        return False
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
            return True
    remove_cached(cache, sha256)
    return False


def _download(store: Store, name: str, sha256: str, size: int, cache: Cache) -> None:
    digest = hashlib.sha256()
    with new_file(cache, sha256) as descriptor:
        for start in range(0, size, PART_BYTES):
            end = min(size, start + PART_BYTES)
            data = store.read(name, start, end)
            if len(data) != end - start:
                reason = f"it ends there, where its manifest says byte {size}"
                raise _damaged(store, name, start + len(data), reason)
            digest.update(data)
            write_all(cache, descriptor, data)
        if digest.hexdigest() != sha256:
            raise _other_hash(store, name, size)


def _damaged(store: Store, name: str, offset: int, reason: str) -> DamagedShard:
    return DamagedShard(f"{store.where(name)} is damaged at byte {offset}: {reason}; fetch or pack the set again")


def _other_hash(store: Store, name: str, size: int) -> DamagedShard:
    return _damaged(store, name, 0, f"its bytes up to {size} do not have the sha256 of its manifest")
