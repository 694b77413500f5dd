"""Sets that do not lie on this machine: the same batches, the same errors, each byte fetched once."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data_shards import ShardSet, UserError, batches, copy_set, index_tars, load_images, open_set, verify
from data_shards.stores import Store, open_store
from tests.data_shards.conftest import MakeSet
from tests.data_shards.servers import FakeServer

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork"),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files_of(shard_set: ShardSet) -> dict[str, Path]:
    return {path.relative_to(shard_set.path).as_posix(): path for path in shard_set.path.rglob("*") if path.is_file()}


def upload(shard_set: ShardSet, place: str, leave_out: str = "") -> Store:
    store = open_store(place)
    for name, path in files_of(shard_set).items():
        if name != leave_out:
            store.put(path, name)
    return store


@pytest.fixture
def remote(request: pytest.FixtureRequest, make_set: MakeSet) -> Callable[[ShardSet], str]:
    """Puts a set where the parameter says and returns its address."""
    kind = request.param

    def put(shard_set: ShardSet) -> str:
        if kind == "web":
            server: FakeServer = request.getfixturevalue("web")
            for name, path in files_of(shard_set).items():
                server.files[f"/sets/{shard_set.path.name}/{name}"] = path.read_bytes()
            return f"http://127.0.0.1:{server.port}/sets/{shard_set.path.name}"
        place = "memory://sets/a" if kind == "memory" else f"{request.getfixturevalue('s3')}/a"
        upload(shard_set, place)
        return place

    return put


everywhere = pytest.mark.parametrize("remote", ["memory", "s3", "web"], indirect=True)


@everywhere
def test_a_remote_set_gives_the_batches_of_the_local_one(make_set: MakeSet, remote: Callable[[ShardSet], str]) -> None:
    shard_set = make_set(100)
    place = remote(shard_set)
    opened = open_set(place)
    assert opened.manifest == shard_set.manifest and opened.place == place
    assert all(torch.equal(one, two) for one, two in zip(
        load_images(opened, np.arange(100)), load_images(shard_set, np.arange(100)), strict=True))
    for world, workers, cache_bytes in ((1, 0, 0), (2, 2, 0), (3, 1, 1 << 20)):
        for rank in range(world):
            options = {"batch": 24, "seed": 3, "rank": rank, "world": world, "images_seen": 48}
            ours = islice(batches(opened, workers=workers, cache_bytes=cache_bytes, **options), 6)  # type: ignore[arg-type]
            theirs = islice(batches(shard_set, **options), 6)  # type: ignore[arg-type]
            for one, two in zip(ours, theirs, strict=True):
                assert one.keys == two.keys and torch.equal(one.images, two.images)
    verify(opened)


@everywhere
@pytest.mark.parametrize("harm", ["flip", "cut", "swap", "empty"])
def test_damage_far_away_is_named(make_set: MakeSet, remote: Callable[[ShardSet], str], harm: str) -> None:
    shard_set = make_set(30)
    path, other = shard_set.shard_path(1), shard_set.shard_path(2)
    data, offset = path.read_bytes(), int(shard_set.samples["offset"][7])
    damaged = {"flip": data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1:], "cut": data[:offset + 5],
               "swap": other.read_bytes(), "empty": b""}[harm]
    path.write_bytes(damaged)
    place = remote(shard_set)
    path.write_bytes(data)
    opened = open_set(place)
    with pytest.raises(UserError, match=rf"{path.name}.* byte \d+"):
        load_images(opened, np.arange(7, 14))
    with pytest.raises(UserError, match=path.name):
        verify(opened)
    assert len(load_images(opened, np.arange(7))[0]) == 7


def test_each_byte_is_fetched_once_and_a_rank_fetches_its_share(make_set: MakeSet, web: FakeServer) -> None:
    shard_set = make_set(960, shard_samples=20)
    for name, path in files_of(shard_set).items():
        web.files[f"/a/{name}"] = path.read_bytes()
    opened = open_set(f"http://127.0.0.1:{web.port}/a")
    web.requests.clear()
    list(islice(batches(opened, batch=24, seed=0, rank=0, world=2, cache_bytes=0), 864 // 24))
    tars = [path for path, _ in web.requests if path.endswith(".tar")]
    # Of 48 shards a rank's 12 streams need 24, one more at each stream's end, and the window ahead of the next pass.
    assert len(set(tars)) == len(tars), "no shard is fetched twice"
    list(islice(batches(opened, batch=24, seed=0, rank=1, world=2, cache_bytes=0), 864 // 24))
    again = [path for path, _ in web.requests if path.endswith(".tar")]
    assert len(set(again)) == len(again), "what one rank has fetched, the other takes from the cache"


def test_a_remote_set_without_a_manifest_is_indexed_where_it_lies(make_set: MakeSet, s3: str) -> None:
    shard_set = make_set(30)
    for number, shard in enumerate(shard_set.manifest.shards):
        open_store(f"{s3}/tars").put(shard_set.shard_path(number), shard.name)
    with pytest.raises(UserError, match="graft shards index s3://"):
        open_set(f"{s3}/tars")
    opened = index_tars(f"{s3}/tars", channels=1)
    assert [shard.sha256 for shard in opened.manifest.shards] == [shard.sha256 for shard in shard_set.manifest.shards]
    assert torch.equal(load_images(opened, np.arange(30))[0], load_images(shard_set, np.arange(30))[0])


def test_a_set_is_copied_to_a_store_and_back(make_set: MakeSet, s3: str, tmp_path: Path) -> None:
    shard_set = make_set(30)
    far = copy_set(shard_set, f"{s3}/copied")
    back = copy_set(far, tmp_path / "back")
    assert far.manifest == back.manifest == shard_set.manifest
    verify(back)
    with pytest.raises(UserError, match="holds a set already"):
        copy_set(shard_set, f"{s3}/copied")
    path = back.shard_path(1)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=path.name):
        copy_set(open_set(tmp_path / "back"), f"{s3}/damaged")
    with pytest.raises(UserError, match=r"holds no manifest\.json"):
        open_set(f"{s3}/damaged")


def test_a_bucket_that_is_not_there_is_named(make_set: MakeSet, s3: str) -> None:
    with pytest.raises(UserError, match="there is no s3://nowhere to write to; make the bucket"):
        copy_set(make_set(5), "s3://nowhere/a")


def test_an_upload_without_its_last_file_is_no_set(make_set: MakeSet, s3: str) -> None:
    upload(make_set(10), f"{s3}/half", leave_out="manifest.json")
    with pytest.raises(UserError, match=r"holds no manifest\.json"):
        open_set(f"{s3}/half")
