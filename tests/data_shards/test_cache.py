"""The cache: one fetch per chunk for all processes, bounded, and never trusted further than it was checked."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_shards import DamagedShard, UserError
from data_shards.stores import Store, cache_files, open_store
from data_shards.stores.cache import ChunkReader, Range, cached_file
from data_shards.stores.cache_files import Cache, locked, open_cache
from tests.data_shards.servers import FakeServer

CHUNK = 1000
BIG = np.random.default_rng(0).bytes(10 * CHUNK + 7)
SMALL = b"small " * 100
SHAS = {data: hashlib.sha256(data).hexdigest() for data in (BIG, SMALL)}

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
fork = multiprocessing.get_context("fork")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return open_cache(tmp_path / "cache", 10**9)


@pytest.fixture
def store(web: FakeServer) -> Store:
    web.files = {"/set/a.tar": BIG, "/set/b.tar": SMALL}
    return open_store(web.url + "/set")


@pytest.fixture
def reader(store: Store, cache: Cache) -> Iterator[ChunkReader]:
    with ChunkReader(store, cache, chunk_bytes=CHUNK) as result:
        yield result


def big(start: int, end: int) -> Range:
    return "a.tar", SHAS[BIG], len(BIG), start, end


def small(start: int, end: int) -> Range:
    return "b.tar", SHAS[SMALL], len(SMALL), start, end


def cached(cache: Cache) -> list[Path]:
    return sorted(path for path in (cache.root / "data").rglob("*") if path.is_file())


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_ranges_are_read_and_each_chunk_is_fetched_once(reader: ChunkReader, web: FakeServer) -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        start, end = sorted(rng.integers(0, len(BIG) + 1, 2).tolist())
        assert reader.read(*big(start, end)) == BIG[start:end]
    assert reader.read(*small(6, 12)) == b"small " and reader.read(*big(0, len(BIG))) == BIG
    assert len(web.requests) == len(set(web.requests)) == 12
    stats = reader.stats()
    assert (stats["bytes_fetched"], stats["requests"], stats["misses"]) == (len(BIG) + len(SMALL), 12, 12)
    assert stats["hits"] > 250


def test_another_reader_finds_what_is_there(reader: ChunkReader, store: Store, cache: Cache, web: FakeServer) -> None:
    reader.read(*big(0, len(BIG)))
    again = pickle.loads(pickle.dumps(reader))
    assert again.read(*big(0, len(BIG))) == BIG and again.stats()["requests"] == 0
    assert len(web.requests) == 11
    with ChunkReader(store, cache, chunk_bytes=CHUNK, open_files=2) as few:
        for start in (0, 5000, 9000, 100, 9900):
            assert few.read(*big(start, start + 100)) == BIG[start : start + 100]
        assert few.stats()["requests"] == 0
    before = len(os.listdir("/proc/self/fd"))
    few.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_local_store_is_read_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "none"))
    (tmp_path / "a.tar").write_bytes(BIG)
    with ChunkReader(open_store(tmp_path), chunk_bytes=CHUNK) as reader:
        reader.prefetch([big(0, 99)])
        assert reader.read(*big(900, 5000)) == BIG[900:5000] and reader.read(*big(0, len(BIG))) == BIG
        reader.forget(SHAS[BIG], 0, len(BIG))
        assert reader.read(*big(9000, 9001)) == BIG[9000:9001]
        (tmp_path / "a.tar").write_bytes(BIG[:50])
        reader.forget(SHAS[BIG])
        with pytest.raises(DamagedShard, match=r"a\.tar is damaged at byte 50: it has 50 bytes"):
            reader.read(*big(0, 99))
    assert cached_file(open_store(tmp_path), "a.tar", hashlib.sha256(BIG[:50]).hexdigest(), 50) == tmp_path / "a.tar"
    with pytest.raises(DamagedShard, match="sha256"):
        cached_file(open_store(tmp_path), "a.tar", SHAS[BIG], 50)
    assert not (tmp_path / "none").exists()


def test_a_shard_that_is_not_the_one_of_the_manifest(reader: ChunkReader, cache: Cache, web: FakeServer) -> None:
    web.files = {"/set/a.tar": BIG[: 5 * CHUNK + 5], "/set/b.tar": SMALL[:-1] + b"!"}
    assert reader.read(*big(10, 20)) == BIG[10:20]
    with pytest.raises(DamagedShard, match=r"set/a\.tar is damaged at byte 5005: it ends there, .* byte 10007; fetch"):
        reader.read(*big(5900, 5950))
    with pytest.raises(DamagedShard, match=r"set/a\.tar is damaged at byte 7000"):
        reader.read(*big(7500, 7550))
    with pytest.raises(DamagedShard, match=r"set/b\.tar is damaged at byte 0: .* sha256 of its manifest"):
        reader.read(*small(0, 5))
    for span in ((-5, 5), (0, len(SMALL) + 1), (99999, 99999 + 5)):
        with pytest.raises(DamagedShard, match="were asked for"):
            reader.read(*small(*span))
    assert len(cached(cache)) == 1
    web.files = {}
    with pytest.raises(UserError, match="does not exist"):
        reader.read(*small(0, 5))


def test_prefetch_fetches_once_and_says_errors_later(reader: ChunkReader, web: FakeServer) -> None:
    reader.prefetch([big(0, 3 * CHUNK), big(500, 600), small(0, 9)])
    assert reader.read(*big(0, 3 * CHUNK)) == BIG[: 3 * CHUNK] and reader.read(*small(0, 9)) == SMALL[:9]
    assert len(web.requests) == 4
    web.faults = [403]
    reader.prefetch([big(5000, 5001)])
    wait_for(lambda: not reader._jobs)
    with pytest.raises(UserError, match="403"):
        reader.read(*big(5000, 5001))
    assert reader.read(*big(5000, 5001)) == BIG[5000:5001]
    reader.prefetch(big(start, start + 1) for start in range(len(BIG)))
    assert reader.read(*big(0, len(BIG))) == BIG and len(web.requests) == 13


def test_a_read_does_not_stand_behind_the_prefetches(reader: ChunkReader, web: FakeServer) -> None:
    reader.threads = 1
    web.faults = ["hang"]
    reader.prefetch([big(0, 1), big(8000, 8001)])
    wait_for(lambda: len(web.requests) == 1)
    assert reader.read(*big(8000, 8001)) == BIG[8000:8001]
    web.ended.set()
    assert reader.read(*big(0, 1)) == BIG[:1]


def test_forget_fetches_damaged_bytes_anew(reader: ChunkReader, cache: Cache, web: FakeServer) -> None:
    reader.read(*big(0, len(BIG)))
    for path in cached(cache):
        path.write_bytes(bytes(path.stat().st_size))
    assert reader.read(*big(1500, 1600)) == bytes(100)  # the caller's CRC finds that
    reader.forget(SHAS[BIG], 1500, 2600)
    assert reader.read(*big(1500, 2600)) == BIG[1500:2600] and len(web.requests) == 13
    reader.forget(SHAS[BIG], 9999)
    assert reader.read(*big(9500, 9600)) == BIG[9500:9600] and len(web.requests) == 14


@pytest.mark.parametrize("plant", ["short", "long", "empty", "link", "other"])
def test_a_planted_file_is_replaced(plant: str, reader: ChunkReader, cache: Cache, tmp_path: Path, web: FakeServer) -> None:
    reader.read(*big(1000, 1001))
    reader.read(*small(0, 1))
    (tmp_path / "x").write_bytes(bytes(CHUNK))
    for path in cached(cache):
        data = path.read_bytes()
        path.unlink()
        if plant == "link":
            path.symlink_to(tmp_path / "x")
        elif plant == "other":  # of a chunk of a larger shard only the length can be checked
            path.write_bytes(bytes(len(data)) if path.name == SHAS[SMALL] else data)
        else:
            path.write_bytes({"short": data[:-1], "long": data + b"!", "empty": b""}[plant])
    with ChunkReader(reader.store, cache, chunk_bytes=CHUNK) as fresh:
        assert fresh.read(*big(1000, 1100)) == BIG[1000:1100] and fresh.read(*small(0, 9)) == SMALL[:9]
        assert fresh.stats()["requests"] == (1 if plant == "other" else 2)
    assert (tmp_path / "x").read_bytes() == bytes(CHUNK)


def test_one_store_cannot_plant_bytes_for_another(cache: Cache, web: FakeServer) -> None:
    web.files = {"/set/a.tar": BIG, "/evil/a.tar": bytes(len(BIG)), "/evil/b.tar": bytes(len(SMALL)), "/set/b.tar": SMALL}
    evil, good = (ChunkReader(open_store(web.url + f"/{name}"), cache, chunk_bytes=CHUNK) for name in ("evil", "set"))
    with evil, good:
        assert evil.read(*big(0, 9)) == bytes(9)
        with pytest.raises(DamagedShard):
            evil.read(*small(0, 9))
        assert good.read(*big(0, 9)) == BIG[:9] and good.read(*small(0, 9)) == SMALL[:9]


def test_whole_files_are_hashed_on_the_way(
    store: Store, cache: Cache, web: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_shards.stores.cache.PART_BYTES", 3000)
    path = cached_file(store, "a.tar", SHAS[BIG], len(BIG), cache)
    assert path.read_bytes() == BIG and len(web.requests) == 4 and path.stat().st_mode & 0o077 == 0
    assert cached_file(store, "a.tar", SHAS[BIG], len(BIG), cache) == path and len(web.requests) == 4
    path.write_bytes(bytes(len(BIG)))
    assert cached_file(store, "a.tar", SHAS[BIG], len(BIG), cache).read_bytes() == BIG and len(web.requests) == 8
    for sha256, size, word in ((SHAS[SMALL], len(BIG), "sha256"), ("0" * 64, len(BIG) + 1, r"damaged at byte 10007: it ends")):
        with pytest.raises(DamagedShard, match=rf"set/a\.tar.*{word}"):
            cached_file(store, "a.tar", sha256, size, cache)
    assert cached(cache) == [path] and not os.listdir(cache.root / "tmp")
    with pytest.raises(UserError, match="raise GRAFT_CACHE_BYTES"):
        cached_file(store, "a.tar", SHAS[BIG], 10**15, cache)
    empty = hashlib.sha256(b"").hexdigest()
    assert cached_file(store, "c.tar", empty, 0, cache).read_bytes() == b""


def _read_all(reader: ChunkReader, seed: int, out: Any) -> None:
    good = True
    for number in np.random.default_rng(seed).permutation(len(BIG) // 100):
        start = int(number) * 100
        good &= reader.read(*big(start, start + 100)) == BIG[start : start + 100]
    out.put((good, reader.stats()["bytes_fetched"]))


def _run(reader: ChunkReader, processes: int) -> list[tuple[bool, int]]:
    out = fork.Queue()
    workers = [fork.Process(target=_read_all, args=(reader, seed, out)) for seed in range(processes)]
    for worker in workers:
        worker.start()
    results = [out.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(10)
        assert worker.exitcode == 0
    return results


def test_processes_share_one_fetch(reader: ChunkReader, web: FakeServer) -> None:
    reader.prefetch([big(0, 1)])  # threads that a fork does not copy
    wait_for(lambda: not reader._jobs)
    results = _run(reader, 6)
    assert all(good for good, _ in results)
    assert sum(fetched for _, fetched in results) == 9 * CHUNK and len(web.requests) == 10  # the last 7 bytes are not read


def test_a_small_cap_slows_reading_down_and_does_not_stop_it(store: Store, cache: Cache, monkeypatch: Any) -> None:
    monkeypatch.setattr(cache_files, "MIN_AGE_S", 0.0)
    cap = 3 * CHUNK
    with ChunkReader(store, Cache(cache.root, cap), chunk_bytes=CHUNK, open_files=2) as reader:
        results = _run(reader, 3)
    assert all(good for good, _ in results) and sum(fetched for _, fetched in results) > len(BIG)
    # What is open is kept beyond the cap: here two chunks for each process.
    assert sum(path.stat().st_size for path in cached(cache)) <= cap + 3 * 2 * CHUNK
    with ChunkReader(store, Cache(cache.root, 1), chunk_bytes=CHUNK) as reader:
        assert reader.read(*big(0, len(BIG))) == BIG and reader.stats()["requests"] <= 11


def test_eviction_takes_what_was_opened_longest_ago(store: Store, cache: Cache, monkeypatch: Any) -> None:
    monkeypatch.setattr(cache_files, "MIN_AGE_S", 0.0)
    small_cache = Cache(cache.root, 4 * CHUNK)
    with ChunkReader(store, small_cache, chunk_bytes=CHUNK) as reader:
        for start in (0, 1000, 2000):
            reader.read(*big(start, start + 1))
    old = cached(cache)
    for age, path in zip((10, 30, 20), old, strict=True):
        os.utime(path, (time.time() - age, time.time() - age))
    orphan, busy = cache.root / "tmp" / "orphan", cache.root / "tmp" / "busy"
    orphan.write_bytes(b"x")
    os.utime(orphan, (0, 0))
    with busy.open("wb") as file:
        cache_files._lock(file.fileno(), 2)
        os.utime(busy, (0, 0))
        with ChunkReader(store, small_cache, chunk_bytes=CHUNK) as reader:
            reader.read(*big(7000, 7001))
            reader.read(*big(8000, 8001))
            assert old[0] in cached(cache) and old[1] not in cached(cache)
        assert busy.exists() and not orphan.exists()


def _hold(cache: Cache, key: str, ready: Any) -> None:
    with locked(cache, key):
        ready.set()
        time.sleep(60)


def test_a_killed_holder_of_a_lock_blocks_nobody(cache: Cache, reader: ChunkReader) -> None:
    ready = fork.Event()
    holder = fork.Process(target=_hold, args=(cache, SHAS[SMALL], ready))
    holder.start()
    assert ready.wait(20) and holder.pid
    seen: list[bytes] = []
    waiting = threading.Thread(target=lambda: seen.append(reader.read(*small(0, 5))))
    waiting.start()
    waiting.join(0.3)
    assert not seen
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(10)
    waiting.join(10)
    assert seen == [SMALL[:5]]


def test_a_holder_that_hangs_is_not_waited_for_for_ever(cache: Cache, reader: ChunkReader, monkeypatch: Any) -> None:
    monkeypatch.setattr(cache_files, "LOCK_WAIT_S", 0.1)
    with locked(cache, SHAS[SMALL]):
        assert reader.read(*small(0, 5)) == SMALL[:5]


def test_a_full_disk_makes_room_once_and_is_then_said(reader: ChunkReader, cache: Cache, monkeypatch: Any) -> None:
    monkeypatch.setattr(cache_files, "MIN_AGE_S", 0.0)
    with ChunkReader(reader.store, cache, chunk_bytes=CHUNK) as before:
        before.read(*big(5000, 5001))
    real, left = os.write, [1, 0]

    def full(descriptor: int, data: Any) -> int:
        if left.pop(0) if left else False:
            return real(descriptor, data[:100])
        if len(left) == 1 or cached(Cache(cache.root, 0)):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    small_cap = Cache(cache.root, CHUNK)
    with ChunkReader(reader.store, small_cap, chunk_bytes=CHUNK) as reader:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            assert reader.read(*big(0, 9)) == BIG[:9]  # in the place of the chunk that was there
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space")))
            with pytest.raises(UserError, match=r"the disk of the cache .* is full; free some space"):
                reader.read(*big(7000, 7009))
            with pytest.raises(UserError, match="is full"):
                cached_file(reader.store, "a.tar", SHAS[BIG], len(BIG), cache)
        assert not os.listdir(cache.root / "tmp")
        assert reader.read(*big(7000, 7009)) == BIG[7000:7009]


def test_an_emptied_cache_is_made_again(reader: ChunkReader, cache: Cache) -> None:
    assert reader.read(*big(0, 9)) == BIG[:9]
    cache.root.rename(cache.root.parent / "gone")
    assert reader.read(*big(5, 9)) == BIG[5:9]  # still open
    assert reader.read(*big(5000, 5009)) == BIG[5000:5009] and len(cached(cache)) == 1


def test_threads_read_while_files_are_closed_under_them(store: Store, cache: Cache) -> None:
    shared = ChunkReader(store, cache, chunk_bytes=CHUNK, open_files=3)

    def work(seed: int) -> bool:
        starts = np.random.default_rng(seed).integers(0, len(BIG) - 50, 3000).tolist()
        return all(shared.read(*big(start, start + 50)) == BIG[start : start + 50] for start in starts)

    with shared, ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_the_folder_is_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAFT_CACHE", raising=False)
    monkeypatch.delenv("GRAFT_CACHE_BYTES", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    cache = open_cache()
    assert cache == Cache(tmp_path / ".cache" / "graft" / "shards", 20 * 10**9)
    assert cache.root.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "c"))
    monkeypatch.setenv("GRAFT_CACHE_BYTES", "123")
    assert open_cache() == Cache(tmp_path / "c", 123)
    (tmp_path / "c").chmod(0o777)
    with pytest.raises(UserError, match="others may write to the cache folder"):
        open_cache()
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "file" / "x"))
    with pytest.raises(UserError, match="cannot be made"):
        open_cache()
    for text in ("20GB", "-1", "0"):
        monkeypatch.setenv("GRAFT_CACHE_BYTES", text)
        with pytest.raises(UserError, match="GRAFT_CACHE_BYTES is"):
            open_cache()


def test_a_cached_read_is_about_one_system_call(reader: ChunkReader) -> None:
    arguments = big(4100, 4900)
    reader.read(*arguments)
    times = []
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(200):
            reader.read(*arguments)
        times.append((time.perf_counter() - began) / 200)
    assert min(times) < 20e-6  # 1 to 2 microseconds on an idle machine
