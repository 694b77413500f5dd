"""What is packed is not trusted: bombs, pickles, links and lies end in one sentence, within 1 GiB of address space."""

from __future__ import annotations

import io
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_shards import UserError, pack_source
from data_shards.sources import base
from tests.data_shards.test_safety import Payload, bomb, forge, png, write_tar
from tests.data_shards.test_sources import SOURCES

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
MIB = 1 << 20


@contextmanager
def little_memory() -> Iterator[None]:
    """1 GiB of address space beyond what is mapped now, by the libraries and by the making of the bomb."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + GIB, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def refused(source: Path, word: str, **options: Any) -> None:
    out = source.parent / "out"
    with pytest.raises(UserError, match=word) as caught, little_memory():
        pack_source(source, out, 8, **options)
    assert "\n" not in str(caught.value)
    assert not out.exists() and not list(source.parent.glob(".out*"))


def zip_of(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_a_bomb_in_a_zip(tmp_path: Path) -> None:
    refused(zip_of(tmp_path / "a.zip", {"a.png": bytes(300 * MIB)}), "as a bomb does")
    refused(zip_of(tmp_path / "b.zip", {f"{i}.png": bytes(5 * MIB) for i in range(40)}), "as a bomb does")
    # The directory states little, and the member unpacks to much: no more than it states is unpacked.
    path = zip_of(tmp_path / "c.zip", {"a.png": bytes(300 * MIB)})
    data = path.read_bytes().replace(struct.pack("<L", 300 * MIB), struct.pack("<L", 1000))
    path.write_bytes(data)
    refused(path, "not those that the archive's directory describes")


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_a_bomb_in_a_compressed_tar(tmp_path: Path, mode: str) -> None:
    path = tmp_path / f"a.tar.{mode}"
    with tarfile.open(path, f"w:{mode}") as tar:  # type: ignore[call-overload]
        member = tarfile.TarInfo("a.png")
        member.size = 100 * MIB
        tar.addfile(member, io.BytesIO(bytes(member.size)))
    assert path.stat().st_size < 400_000
    refused(path, "as a bomb does")


def test_a_picture_bomb_is_a_bad_image_in_every_source(tmp_path: Path) -> None:
    data = bomb(14_000)
    column = pa.array([data])
    pq.write_table(pa.table({"image": column}), tmp_path / "a.parquet")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(data)
    for path in (zip_of(tmp_path / "a.zip", {"a.png": data}), write_tar(tmp_path / "a.tar", [("a.png", data)]),
                 tmp_path / "a.parquet", tmp_path / "in"):  # fmt: skip
        refused(path, r"bad image\(s\).*(over the cap|bomb)")


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "a/../../b.png", "a\\..\\b.png", "~root/a.png", "a\x1b[2J.png"])
def test_names_that_leave_the_archive(tmp_path: Path, name: str) -> None:
    refused(zip_of(tmp_path / "a.zip", {name: png()}), "unsafe name")
    refused(write_tar(tmp_path / "a.tar", [(name, png())]), "unsafe name")
    long = f"{'x/' * 60}../{name}"
    for number, form in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        refused(write_tar(tmp_path / f"long{number}.tar", [(long, png())], format=form), "unsafe name")
    refused(write_tar(tmp_path / "c.tar", [(name, png()), (name + ".cls", b"1")]), "unsafe name")


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices(tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("b.png")
    member.type, member.linkname = kind, "/etc/passwd"
    refused(write_tar(tmp_path / "a.tar", [("a.png", png()), (member, b"")]), r"'b\.png' is a ")
    link = zipfile.ZipInfo("b.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    refused(tmp_path / "a.zip", "a link or a device")


def test_a_pipe_in_a_folder_does_not_block(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    os.mkfifo(tmp_path / "in" / "a.png")
    refused(tmp_path / "in", "no plain file")


def test_encrypted_archives(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "a.zip", {"a.png": png()})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    refused(path, "is encrypted")
    refused(path.rename(tmp_path / "a.npz"), "is encrypted")


def test_members_that_lie_about_where_they_are(tmp_path: Path) -> None:
    """Overlapping members, offsets past the end, and methods that are not read."""
    path = zip_of(tmp_path / "a.zip", {"a.png": png()})
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\1\2")
    for field, value, word in ((42, 10, "no member where"), (42, 10**6, "cannot be read as zip|ends"), (10, 14, "method 14"),
                               (20, 2**31 - 1, "over|ends"), (16, 1, "not those")):  # fmt: skip
        forged = bytearray(data)
        forged[entry + field : entry + field + 4] = struct.pack("<L", value) if field != 10 else struct.pack("<HH", 14, 0)
        path.write_bytes(forged)
        refused(path, word)


def test_a_tar_with_absurd_sizes(tmp_path: Path) -> None:
    for size in (b"-0000001000\0", b"77777777777\0", b"\x80" + b"\0" * 10 + b"\x10"):
        path = write_tar(tmp_path / "a.tar", [("a.png", png()), ("b.png", png(1))])
        forge(path, slice(124, 136), size)
        refused(path, "is damaged at byte 0")
    member = tarfile.TarInfo("a.png")
    member.pax_headers = {"size": "9"}
    refused(write_tar(tmp_path / "a.tar", [(member, png())], format=tarfile.PAX_FORMAT), "sets 'size'")


def test_pickles_in_arrays_are_not_read(tmp_path: Path, canary: Path) -> None:
    evil = np.array([Payload(canary)] * 3, object)
    good = np.zeros((3, 8, 8), np.uint8)
    np.save(tmp_path / "a.npy", evil, allow_pickle=True)
    refused(tmp_path / "a.npy", "holds Python objects")
    np.savez(tmp_path / "a.npz", images=evil, labels=np.arange(3))
    refused(tmp_path / "a.npz", "holds Python objects")
    np.savez(tmp_path / "b.npz", images=good, labels=evil)
    refused(tmp_path / "b.npz", "holds Python objects")
    np.save(tmp_path / "c.npy", good)
    np.save(tmp_path / "labels.npy", evil, allow_pickle=True)
    refused(tmp_path / "c.npy", "holds Python objects")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "d.npy").write_bytes(pickle.dumps(Payload(canary)))
    refused(tmp_path / "d" / "d.npy", "cannot be read as arrays")
    refused(zip_of(tmp_path / "e.npz", {"images.npy": pickle.dumps(Payload(canary))}), "cannot be read as arrays")


def header(shape: str, kind: str = "|u1") -> bytes:
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode()


def test_arrays_that_claim_what_they_do_not_hold(tmp_path: Path) -> None:
    cases = [("(2000000000, 8, 8)", "is damaged"), ("(2000000000, 0, 0)", "is damaged"),
             ("(1, 100000, 100000)", "is damaged"), ("(-1, 8, 8)", "is damaged|cannot"),
             ("'x'", "cannot be read"), ("(" * 5000, "cannot be read")]
    for shape, word in cases:
        (tmp_path / "a.npy").write_bytes(header(shape) + bytes(64))
        refused(tmp_path / "a.npy", word)
        refused(zip_of(tmp_path / "a.npz", {"images.npy": header(shape) + bytes(64)}), word)
    path = tmp_path / "b.npz"
    np.savez_compressed(path, images=np.zeros((300, 1024, 1024), np.uint8))
    refused(path, "as a bomb does")


def test_a_table_that_blows_up(tmp_path: Path) -> None:
    """A dictionary of one value, and pages that are all zeros."""
    one = pa.DictionaryArray.from_arrays(pa.array(np.zeros(20_000, np.int32)), pa.array([bytes(MIB)]))
    pq.write_table(pa.table({"image": one}), tmp_path / "a.parquet",
                   dictionary_pagesize_limit=64 * MIB, store_schema=False)  # fmt: skip
    assert (tmp_path / "a.parquet").stat().st_size < MIB
    refused(tmp_path / "a.parquet", "as a bomb does", max_bad=10**6)
    wide = pa.table({"image": pa.array([bytes(100 * MIB)] * 2)})
    pq.write_table(wide, tmp_path / "b.parquet", compression="zstd", use_dictionary=False, store_schema=False)
    refused(tmp_path / "b.parquet", r"b\.parquet\[[01]\] \(it has over")
    labels = pa.DictionaryArray.from_arrays(pa.array(np.zeros(20_000, np.int32)), pa.array(["x" * MIB]))
    pq.write_table(pa.table({"image": [b"x"] * 20_000, "label": labels}), tmp_path / "c.parquet", store_schema=False,
                   dictionary_pagesize_limit=64 * MIB)  # fmt: skip
    refused(tmp_path / "c.parquet", "too large to be labels|more memory")


def test_a_table_of_too_many_rows(tmp_path: Path) -> None:
    """A billion rows of one byte each is a few kilobytes of parquet."""
    path = tmp_path / "a.parquet"
    with pq.ParquetWriter(path, pa.schema({"image": pa.binary()})) as writer:
        batch = pa.table({"image": pa.array([b"x"] * 500_000)})
        for _ in range(6):
            writer.write_table(batch)
    assert path.stat().st_size < 30_000
    refused(path, "claims to hold 3000000 images")


def test_the_cap_on_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "MAX_ITEMS", 2)
    refused(zip_of(tmp_path / "a.zip", {f"{i}.png": png(i) for i in range(3)}), "claims to hold 3 images")


@pytest.mark.parametrize("kind", SOURCES)
def test_damage_anywhere_is_found_or_harmless(tmp_path: Path, kind: str) -> None:
    """Flipped bits and cuts at random: an error in one sentence, or the undamaged pictures, or counted bad ones."""
    source = SOURCES[kind](tmp_path / "in")
    file = source if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())[0]
    data, draw = file.read_bytes(), random.Random(0)
    for attempt in range(12):
        damaged = bytearray(data)
        if attempt % 4 == 3:
            del damaged[draw.randrange(len(data)) :]
        else:
            damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        try:
            with little_memory():
                pack_source(source, tmp_path / f"out{attempt}", 8, max_bad=3)
        except UserError as error:
            assert "\n" not in str(error)
        except UnicodeError:
            pytest.fail("a name that is no text")


def test_packing_in_a_process_of_little_memory(tmp_path: Path) -> None:
    """The limit as a user would set it: on the whole process, from its start."""
    zip_of(tmp_path / "a.zip", {"a.png": bytes(300 * MIB)})
    code = (
        "import resource; import data_shards; from data_shards import pack_source, UserError;"
        f"mapped = int(open('/proc/self/statm').read().split()[0]) * {resource.getpagesize()};"
        f"resource.setrlimit(resource.RLIMIT_AS, (max(mapped, {GIB}) + 1,) * 2)\n"
        f"try: pack_source({str(tmp_path / 'a.zip')!r}, {str(tmp_path / 'out')!r}, 8)\nexcept UserError as e: print(e)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert "as a bomb does" in ran.stdout


