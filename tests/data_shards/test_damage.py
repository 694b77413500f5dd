"""Whatever happens to a shard's bytes, the reader gives the right data or an error that names the shard."""

from __future__ import annotations

import io
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_shards import DamagedShard, ShardSet, UserError, batches, index_tars, load_images, open_set, verify
from data_shards.manifest import write_set
from tests.data_shards.conftest import MakeSet, picture

Rng = np.random.Generator


def flip(data: bytes, _other: bytes, rng: Rng) -> bytes:
    copy = bytearray(data)
    copy[rng.integers(len(data))] ^= 1 << rng.integers(8)
    return bytes(copy)


def truncate(data: bytes, _other: bytes, rng: Rng) -> bytes:
    return data[: rng.integers(len(data))]


def empty(_data: bytes, _other: bytes, _rng: Rng) -> bytes:
    return b""


def exchange(data: bytes, other: bytes, _rng: Rng) -> bytes:
    """Another shard of the set in its place, in the same length, which the check of sizes would not see."""
    return other[: len(data)].ljust(len(data), b"\0")


def zero_block(data: bytes, _other: bytes, rng: Rng) -> bytes:
    start = 512 * int(rng.integers(len(data) // 512))
    return data[:start] + bytes(512) + data[start + 512 :]


@pytest.mark.parametrize(("damage", "times"), [(flip, 650), (truncate, 100), (empty, 20), (zero_block, 200), (exchange, 30)])
def test_random_damage_is_never_silent(make_set: MakeSet, damage: Callable[[bytes, bytes, Rng], bytes], times: int) -> None:
    """A thousand corruptions in all: each ends in the full data or in an error that names shard and byte."""
    shard_set = make_set(21)
    expected = load_images(shard_set, np.arange(21))
    originals = [shard_set.shard_path(i).read_bytes() for i in range(3)]
    rng, refused = np.random.default_rng(0), 0
    for _ in range(times):
        shard = int(rng.integers(3))
        path = shard_set.shard_path(shard)
        path.write_bytes(damage(originals[shard], originals[(shard + int(rng.integers(1, 3))) % 3], rng))
        try:
            found = load_images(open_set(shard_set.path), np.arange(21))
            assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
        except UserError as error:
            refused += 1
            assert path.name in str(error) and re.search(r"byte \d+", str(error)), error
        if path.read_bytes() != originals[shard]:
            with pytest.raises(DamagedShard, match=path.name):
                verify(shard_set)
        path.write_bytes(originals[shard])
    assert refused > 0.04 * times, "an image of 100 bytes is a twentieth of its 2 kB in a tar"


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_stop_with_the_shards_name(make_set: MakeSet, workers: int) -> None:
    shard_set = make_set(21)
    index = shard_set.indices()[3]
    path, offset = shard_set.shard_path(int(shard_set.shards_of(index))), int(shard_set.samples["offset"][index])
    data = bytearray(path.read_bytes())
    data[offset + 60] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedShard, match=f"{path.name} is damaged at byte {offset}") as caught:
        list(islice(batches(shard_set, batch=6, seed=0, workers=workers), 5))
    assert "\n" not in str(caught.value)


def test_a_missing_shard_and_one_that_is_a_pipe_are_named(make_set: MakeSet) -> None:
    shard_set = make_set(21)
    path = shard_set.shard_path(1)
    path.unlink()
    with pytest.raises(DamagedShard, match=path.name):
        open_set(shard_set.path)
    os.mkfifo(path)
    with pytest.raises(DamagedShard, match="not a regular file"):
        open_set(shard_set.path)
    with pytest.raises(UserError, match=f"{path.name} is not a regular file"):
        load_images(shard_set, np.arange(21))


@pytest.mark.parametrize("name", ["manifest.json", "samples/offset.npy", "samples/key.npy", "samples/split.npy"])
def test_damage_beside_the_shards_is_noticed(make_set: MakeSet, name: str) -> None:
    shard_set = make_set(21)
    path = shard_set.path / name
    original, rng = path.read_bytes(), np.random.default_rng(1)
    for number in range(60):
        damaged = (flip if number % 4 else truncate)(original, b"", rng)
        path.write_bytes(damaged)
        try:
            opened = open_set(shard_set.path)
            verify(opened)
            assert opened.manifest == shard_set.manifest, "only white space may change unnoticed"
            assert damaged == original or name == "manifest.json"
        except UserError as error:
            assert name in str(error) or "graft" in str(error)
    path.unlink()
    with pytest.raises(UserError, match="graft shards index"):
        open_set(shard_set.path)


def test_a_table_of_another_set_is_refused(make_set: MakeSet, tmp_path: Path) -> None:
    one, two = make_set(21), make_set(21, name="other", classes=3)
    shutil.copy(two.path / "samples" / "label.npy", one.path / "samples" / "label.npy")
    with pytest.raises(UserError, match=r"label\.npy .* the sha256 of its manifest"):
        open_set(one.path).samples["label"]


def test_rows_that_point_outside_their_shard_are_refused(make_set: MakeSet) -> None:
    """Hashes that match prove nothing about who wrote them."""
    shard_set: ShardSet = make_set(21)
    for field, value, word in (("offset", 1 << 61, "were asked for"), ("offset", (1 << 64) - 1, "were asked for"),
                               ("offset", 0, "damaged at byte 0"), ("size", 1 << 31, "do not agree"),
                               ("size", 1 << 25, "were asked for"),
                               ("label", 99, "do not agree"), ("split", 5, "do not agree"), ("suffix", 1, "do not agree")):
        rows = {name: np.array(column) for name, column in shard_set.samples.items()}
        rows[field][4] = value
        write_set(shard_set.path, shard_set.manifest, rows)
        with pytest.raises(UserError, match=word):
            opened = open_set(shard_set.path)
            verify(opened)
            load_images(opened, np.arange(21))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_a_flipped_bit_in_a_format_without_checksums_is_noticed(tmp_path: Path, kind: str) -> None:
    """PNG decoders notice most damage themselves; these show a slightly other picture."""
    buffer, suffix = io.BytesIO(), kind.lower()
    Image.fromarray(picture(0, side=16)[0]).save(buffer, kind)
    data, path = buffer.getvalue(), tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        member = tarfile.TarInfo(f"a.{suffix}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    shard_set = index_tars(tmp_path, channels=1)
    original, rng = path.read_bytes(), np.random.default_rng(0)
    for place in rng.integers(512, 512 + len(data), 50).tolist():
        copy = bytearray(original)
        copy[place] ^= 1 << rng.integers(8)
        path.write_bytes(copy)
        with pytest.raises(DamagedShard, match=r"a\.tar is damaged at byte 512"):
            load_images(shard_set, [0])
