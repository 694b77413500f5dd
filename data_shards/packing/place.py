"""Where shards lie while they are made, and which are finished, so that a killed pack goes on from them.

For a set on this machine that is the folder `.NAME.partial` beside it, which is renamed to NAME at the end: a set is there
whole or not at all. For one in an object store the shards are uploaded under their final names as they are made, and the
set is there when `manifest.json`, written last, is. Either way each shard has a record: what is in it, and its hash. A lock
on the folder (for a store: on one in this machine's cache) lets no two processes of a machine pack one set.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_shards.errors import UserError
from data_shards.files import sync, write_bytes
from data_shards.manifest import MANIFEST
from data_shards.packing.record import Record
from data_shards.stores import Store, open_store
from data_shards.tarfiles import local_path

WORK = ".work"  # in the draft: records, and what was unpacked; removed at the end
REMOTE_WORK = "packing"  # in a store, likewise
JOB = "job.json"
LOCK_WAIT_S = 2.0  # the processes of a killed pack take a moment to notice

Say = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """A set that is being made: the draft's folder, and the URL of the store where it is to be, "" for this machine."""

    folder: Path
    url: str = ""

    @property
    def store(self) -> Store | None:
        return open_store(self.url) if self.url else None

    @property
    def work(self) -> Path:
        """What is of no use once the set is there."""
        return self.folder / WORK

    def workplace(self) -> Path | None:
        """Where a process that makes a shard may write: None is its machine's own temporary folder."""
        return None if self.url else self.work


@contextlib.contextmanager
def open_place(out: str | os.PathLike[str], overwrite: bool) -> Iterator[Place]:
    """Locks the place of a new set and, if the block ends well, makes it the set.

    What is finished stays there when the block fails. Raises `UserError` if a set is there and `overwrite` is not set, if
    something else is there, if it cannot be written, or if another process is filling it.
    """
    check_free(out, overwrite)
    if is_url(out):
        with _open_remote(os.fspath(out).rstrip("/"), overwrite) as place:
            yield place
        return
    target = local_path(out)
    draft = target.absolute().parent / f".{target.name}.partial"  # other processes have other working folders
    with _locked(draft, target):
        place = Place(draft)
        place.work.mkdir(exist_ok=True)
        try:
            yield place
        except BaseException:
            if not any(place.work.glob("*.record")):
                shutil.rmtree(draft, ignore_errors=True)
            raise
        _replace_folder(draft, target)
        shutil.rmtree(target / WORK, ignore_errors=True)


def is_url(out: str | os.PathLike[str]) -> bool:
    """Whether a set is to be in an object store."""
    return "://" in os.fspath(out)


def check_free(out: str | os.PathLike[str], overwrite: bool) -> None:
    """Raises `UserError` if a set is there and `overwrite` is not set, or if something else is there."""
    if is_url(out):
        url = os.fspath(out).rstrip("/")
        store = open_store(url)
        if url.startswith(("http://", "https://")):
            raise UserError(f"{url} is on a web server, which is only read; give a folder or an object store such as s3://")
        if store.exists(MANIFEST):
            if not overwrite:
                raise UserError(f"{url} holds a set already; choose another place, or overwrite it with --overwrite")
        elif not store.exists(f"{REMOTE_WORK}/{JOB}") and (names := sorted(store.names())):
            raise UserError(f"{url} is not empty ({names[0]}) and holds no set; choose another place, or empty it")
        return
    target = local_path(out)
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        if not (target / MANIFEST).is_file():
            raise UserError(f"{target} exists already and is no set of shards; choose another folder, or remove it")
        if not overwrite:
            raise UserError(f"{target} exists already; choose another folder, or overwrite it with --overwrite")


@contextlib.contextmanager
def _open_remote(url: str, overwrite: bool) -> Iterator[Place]:
    store = open_store(url)
    cache = local_path(os.environ.get("GRAFT_CACHE") or Path.home() / ".cache" / "graft")
    scratch = cache.absolute() / "packing" / hashlib.sha256(url.encode()).hexdigest()[:24]
    with _locked(scratch, url):
        if overwrite and store.exists(MANIFEST):
            store.remove(MANIFEST)
        (scratch / WORK).mkdir(exist_ok=True)
        yield Place(scratch, url)
        shutil.rmtree(scratch, ignore_errors=True)


def resume(place: Place, identity: str, shards: int, say: Say) -> dict[int, Record]:
    """The shards, by number, that an earlier attempt at the same `identity` has finished; anything else is cleared away."""
    for left in (*place.work.glob("shard-*"), *place.work.glob(".*.partial")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    before = _read_work(place, JOB)
    if before is not None and identity and json.loads(before).get("identity") == identity:
        found = {number: record for number in range(shards) if (record := _read_record(place, number))}
        if not place.url:
            _clear(place.folder, {place.work.name, *(record.name for record in found.values())})
        say(f"going on with an unfinished pack: {len(found)} of {shards} shards are there")
        return found
    if before is not None:
        say("starting anew: the options or the source are not those of the unfinished pack that is there")
    if place.store is not None:
        for name in sorted(place.store.names()):  # only an attempt of ours lets it come to this
            place.store.remove(name)
    else:
        _clear(place.folder, {place.work.name})
        for entry in place.work.glob("*.record"):
            entry.unlink()
    _write_work(place, JOB, json.dumps({"identity": identity}).encode())
    return {}


def _clear(folder: Path, keep: set[str]) -> None:
    for entry in folder.iterdir():
        if entry.name not in keep:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def save(place: Place, number: int, record: Record, tar: Path | None) -> None:
    """Makes a file the shard of that number, and then its record; a shard without samples has no file."""
    if tar is not None:
        put(place, tar, record.name)
    _write_work(place, _record_name(number), record.to_bytes())


def replace_shard(place: Place, number: int, old: Record, new: Record, tar: Path | None) -> None:
    """Puts `tar` (None: the same bytes) in the place of a shard, whose name may change, and writes its record anew.

    Names go down only, from the first shard to the last, so that a shard never takes the name of one that is still needed.
    """
    store = place.store
    forget(place, number)
    if store is None:
        source = tar or place.folder / old.name
        if new.name and source != place.folder / new.name:
            os.replace(source, place.folder / new.name)
        if old.name != new.name:
            (place.folder / old.name).unlink(missing_ok=True)
        sync(place.folder)
    else:
        if new.name and (tar is not None or new.name != old.name):
            source = tar or get(place, old)
            store.put(source, new.name)
            source.unlink(missing_ok=True)
        if old.name != new.name:
            store.remove(old.name)
    _write_work(place, _record_name(number), new.to_bytes())


def get(place: Place, record: Record) -> Path:
    """The shard of a record as a file on this machine; one from a store is a copy, to be removed."""
    store = place.store
    if store is None:
        return place.folder / record.name
    path = place.work / f"got-{record.name}"
    with path.open("wb") as file:
        for start in range(0, record.size, 1 << 24):
            file.write(store.read(record.name, start, min(record.size, start + (1 << 24))))
    return path


def put(place: Place, file: Path, name: str) -> None:
    """Makes a file on this machine, which is gone afterwards, the file `name` of the set."""
    store = place.store
    if store is None:
        os.replace(file, place.folder / name)
        sync(place.folder)
    else:
        store.put(file, name)
        file.unlink()


def forget(place: Place, number: int) -> None:
    """Removes the record of a shard: it counts as not made."""
    store = place.store
    if store is None:
        (place.work / _record_name(number)).unlink(missing_ok=True)
    elif store.exists(f"{REMOTE_WORK}/{_record_name(number)}"):
        store.remove(f"{REMOTE_WORK}/{_record_name(number)}")


def clear_work(place: Place, shards: int) -> None:
    """Removes from a store what a finished set does not need; on this machine that goes with the folder."""
    store = place.store
    if store is not None:
        for name in (*map(_record_name, range(shards)), JOB):
            store.remove(f"{REMOTE_WORK}/{name}")


def _record_name(number: int) -> str:
    return f"{number:06d}.record"


def _read_record(place: Place, number: int) -> Record | None:
    """The record of a finished shard, None if there is none or its shard is not the one it describes."""
    data = _read_work(place, _record_name(number))
    if data is None:
        return None
    try:
        record = Record.from_bytes(data)
        if not place.url and record.name and (place.folder / record.name).stat().st_size != record.size:
            return None
    except (ValueError, KeyError, OSError):  # of another version, or its shard is gone: it is made again
        return None
    return record


def _write_work(place: Place, name: str, data: bytes) -> None:
    store = place.store
    if store is None:
        write_bytes(place.work / name, data)
    else:  # the length stands first, as a store is read by ranges
        store.write(f"{REMOTE_WORK}/{name}", len(data).to_bytes(8, "little") + data)


def _read_work(place: Place, name: str) -> bytes | None:
    store = place.store
    if store is None:
        path = place.work / name
        return path.read_bytes() if path.is_file() else None
    remote = f"{REMOTE_WORK}/{name}"
    if not store.exists(remote):
        return None
    size = int.from_bytes(store.read(remote, 0, 8), "little")
    return store.read(remote, 8, 8 + size)


@contextlib.contextmanager
def _locked(draft: Path, target: Path | str) -> Iterator[None]:
    """Makes the folder `draft` if need be and holds its lock, which ends with the process."""
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            draft.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(draft, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            raise UserError(f"{target} cannot be written ({error.strerror}); choose another folder") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between our open and our lock, another process may have finished and renamed this very folder.
            if draft.exists() and os.path.samestat(os.fstat(descriptor), draft.stat()):
                break
        except BlockingIOError:
            pass
        except OSError as error:
            os.close(descriptor)
            raise UserError(f"{draft} cannot be locked ({error.strerror}); choose a folder on another file system") from None
        os.close(descriptor)
        if time.monotonic() >= deadline:
            raise UserError(f"another process is writing {target}; wait for it or choose another folder")
        time.sleep(0.05)
    try:
        yield
    finally:
        os.close(descriptor)


def _replace_folder(new: Path, target: Path) -> None:
    sync(new)
    old = target.parent / f".{target.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(new, target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)
