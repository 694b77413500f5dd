"""A pack that is killed goes on from its finished shards and ends with the bytes of one that was not; stores likewise."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_shards import Sample, ShardSet, UserError, open_set, pack_arrays, pack_images, pack_source, verify
from data_shards.files import write_bytes
from data_shards.packing import finish, place
from tests.data_shards.conftest import picture
from tests.data_shards.test_pack import folder_of

ROOT = Path(__file__).parents[2]


def drawing(number: int) -> tuple[np.ndarray, int]:
    return picture(number), number % 3


def slow_drawing(number: int) -> tuple[np.ndarray, int]:
    time.sleep(0.01)
    return drawing(number)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def pack_drawings(out: Path, make: Any = drawing, **options: Any) -> ShardSet:
    defaults: dict[str, Any] = {"name": "d", "shape": (1, 8, 8), "identity": "1", "classes": "abc", "shard_samples": 10}
    return pack_arrays(make, 100, out, **{**defaults, **options})


@pytest.mark.parametrize("processes", [2, 3])
def test_the_number_of_processes_changes_no_byte(tmp_path: Path, processes: int) -> None:
    root = folder_of(tmp_path / "in", [f"{c}/{i}.png" for c in "ab" for i in range(30)])
    (root / "a" / "bad.png").write_bytes(b"no")
    (root / "b" / "copy.png").write_bytes((root / "a" / "3.png").read_bytes())
    options: dict[str, Any] = {"reference": 0.3, "shard_samples": 9, "max_bad": 1, "name": "x"}
    one = pack_source(root, tmp_path / "one", 8, 3, **options)
    many = pack_source(root, tmp_path / "many", 8, 3, processes=processes, **options)
    assert content(one.path) == content(many.path) and one.manifest.duplicates == 1
    assert pack_drawings(tmp_path / "d", processes=processes).manifest == pack_drawings(tmp_path / "e").manifest


@pytest.mark.parametrize("processes", [1, 2])
def test_a_pack_killed_for_real_goes_on(tmp_path: Path, processes: int) -> None:
    whole = pack_drawings(tmp_path / "whole" / "set")
    out = tmp_path / "killed" / "set"
    code = (
        "from pathlib import Path; from tests.data_shards.test_pack_resume import pack_drawings, slow_drawing;"
        f"pack_drawings(Path({str(out)!r}), slow_drawing, processes={processes})"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    work = out.parent / ".set.partial" / ".work"
    with subprocess.Popen([sys.executable, "-c", code], env=env) as process:
        deadline = time.monotonic() + 60
        while len(list(work.glob("*.record"))) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    with pytest.raises(UserError):
        open_set(out)
    finished = len(list(work.glob("*.record")))
    said: list[str] = []
    made: list[int] = []
    again = pack_drawings(out, lambda number: made.append(number) or drawing(number), say=said.append)  # type: ignore[func-returns-value]
    assert 3 <= finished < 10 and len(made) == 100 - 10 * finished, "finished shards were made again"
    assert any(f"{finished} of 10 shards" in sentence for sentence in said)
    assert content(again.path) == content(whole.path)
    assert not list(out.parent.glob(".*"))


def test_a_failed_pack_goes_on_when_more_is_allowed(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "in", [f"{i:02d}.png" for i in range(40)])
    (root / "17.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"17\.png"):
        pack_source(root, tmp_path / "out", 8, 1, shard_samples=5)
    said: list[str] = []
    shard_set = pack_source(root, tmp_path / "out", 8, 1, shard_samples=5, max_bad=1, say=said.append)
    assert "going on" in said[0] and len(shard_set) == 39


def test_another_option_or_source_starts_anew_and_says_so(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "in", [f"{i:02d}.png" for i in range(40)])
    whole = pack_source(root, tmp_path / "whole", 8, 1, shard_samples=5, seed=1, name="x")

    def interrupted(**options: Any) -> None:
        def stop(done: int, _total: int, _written: int) -> None:
            if done > 20:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pack_source(root, tmp_path / "out", 8, 1, shard_samples=5, name="x", progress=stop, **options)

    said: list[str] = []
    interrupted(seed=0)
    interrupted(seed=1, say=said.append)
    assert said[0].startswith("starting anew")
    shard_set = pack_source(root, tmp_path / "out", 8, 1, shard_samples=5, seed=1, name="x", say=said.append)
    assert said[1].startswith("going on") and content(shard_set.path) == content(whole.path)
    interrupted(overwrite=True)
    os.utime(root / "00.png", (1, 1))
    pack_source(root, tmp_path / "out", 8, 1, shard_samples=5, overwrite=True, say=said.append)
    assert said[-1].startswith("starting anew")


def test_a_damaged_record_or_a_lost_shard_is_made_again(tmp_path: Path) -> None:
    whole = pack_drawings(tmp_path / "whole")

    def stop(done: int, _total: int, _written: int) -> None:
        if done > 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_drawings(tmp_path / "out", progress=stop)
    draft = tmp_path / ".out.partial"
    (draft / ".work" / "000000.record").write_bytes(b"PK nothing")
    (draft / "shard-000001.tar").unlink()
    (draft / "shard-000099.tar").write_bytes(b"x")
    said: list[str] = []
    again = pack_drawings(tmp_path / "out", say=said.append)
    assert content(again.path) == content(whole.path) and "3 of 10" in said[0]


def test_a_kill_while_copies_are_taken_out_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any of its steps."""

    def pack(out: Path) -> ShardSet:
        return pack_arrays(lambda i: (picture(i % 23), 0), 40, out, name="d", shape=(1, 8, 8), identity="1", classes="a",
                           shard_samples=4, keep_duplicates=False)  # fmt: skip

    whole = pack(tmp_path / "whole")
    assert len(whole) == 23 and whole.manifest.duplicates == 17
    assert [shard.name for shard in whole.manifest.shards] == [f"shard-{i:06d}.tar" for i in range(len(whole.manifest.shards))]
    verify(whole)
    original, unlink = write_bytes, Path.unlink
    for step in (0, 1, 8, 12, 19, 23, 26, 29, 32):
        left = [step]

        def count(*arguments: Any, left: list[int] = left, call: Any = original) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            call(*arguments)

        def remove(self: Path, missing_ok: bool = False, left: list[int] = left) -> None:
            count(self, missing_ok, left=left, call=unlink)

        out = tmp_path / f"out-{step}"
        with monkeypatch.context() as patched:
            patched.setattr("data_shards.packing.place.write_bytes", count)
            patched.setattr(finish, "write_set", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            patched.setattr(Path, "unlink", remove)
            with pytest.raises(KeyboardInterrupt):
                pack(out)
        assert not out.exists()
        assert content(pack(out).path) == content(whole.path), step


class FolderStore:
    """The interface of an object store, over a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.puts = folder, 0

    def read(self, name: str, start: int, end: int) -> bytes:
        return (self.folder / name).read_bytes()[start:end]

    def put(self, file: Path, name: str) -> None:
        self.puts += 1
        self.write(name, file.read_bytes())

    def write(self, name: str, data: bytes) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(data)

    def exists(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def names(self) -> Iterable[str]:
        return [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]

    def remove(self, name: str) -> None:
        (self.folder / name).unlink()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderStore:
    made = FolderStore(tmp_path / "bucket")
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(place, "open_store", lambda _url: made)
    monkeypatch.setattr("data_shards.pack.open_set", lambda _out: open_set(made.folder))
    return made


def test_a_set_in_a_store_has_the_same_bytes_and_goes_on(
    tmp_path: Path, store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder_of(tmp_path / "in", [f"{i:02d}.png" for i in range(40)])
    (root / "99.png").write_bytes((root / "05.png").read_bytes())
    options: dict[str, Any] = {"shard_samples": 5, "name": "x", "reference": 0.2}
    def stop(done: int, _total: int, _written: int) -> None:
        if done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_source(root, "s3://bucket/set", 8, 1, progress=stop, **options)
    assert not store.exists("manifest.json") and store.exists("shard-000001.tar")
    said: list[str] = []
    pack_source(root, "s3://bucket/set", 8, 1, say=said.append, **options)
    assert "of 9 shards are there" in said[0] and not said[0].startswith("going on with an unfinished pack: 0")
    monkeypatch.setattr("data_shards.pack.open_set", open_set)
    pack_source(root, tmp_path / "whole", 8, 1, **options)
    assert content(store.folder) == content(tmp_path / "whole")
    monkeypatch.setattr("data_shards.pack.open_set", lambda _out: open_set(store.folder))
    with pytest.raises(UserError, match="holds a set already"):
        pack_source(root, "s3://bucket/set", 8, 1, **options)
    pack_source(root, "s3://bucket/set", 8, 1, overwrite=True, **options)
    assert content(store.folder) == content(tmp_path / "whole")
    assert not any((tmp_path / "cache" / "packing").iterdir())


def test_a_store_with_something_else_is_left_alone(tmp_path: Path, store: FolderStore) -> None:
    store.write("thesis.txt", b"x")
    with pytest.raises(UserError, match=r"not empty \(thesis\.txt\)"):
        pack_images([Sample("a", picture(0))], "s3://bucket/set", name="s", shape=(1, 8, 8))
    assert content(store.folder) == {"thesis.txt": b"x"}


def test_a_process_that_dies_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was killed, perhaps for want of memory"):
        pack_drawings(tmp_path / "out", die, processes=2)
    with pytest.raises(UserError, match=r"has the label 7.*the set has 3 classes"):
        pack_drawings(tmp_path / "out", lambda number: (picture(number), 7))
    with pytest.raises(UserError, match="processes=1"):
        pack_drawings(tmp_path / "out", lambda number: drawing(number), processes=2)


def die(_number: int) -> tuple[np.ndarray, int]:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError
