"""Shards, shard lists and images are not trusted: every attack ends in an error before anything runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_shards import BadImage, DamagedShard, UserError, index_tars, load_images, open_set, pack_source, verify
from data_shards.files import hash_file
from data_shards.images import decode_image, decode_into, encode_png
from data_shards.manifest import Column, Manifest
from tests.data_shards.conftest import MakeSet, picture


def png(number: int = 0) -> bytes:
    return encode_png(picture(number))


def write_tar(path: Path, members: list[tuple[Any, bytes]], **options: Any) -> Path:
    """A tar of (name or TarInfo, data)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=options.pop("format", tarfile.USTAR_FORMAT)) as tar:
        for name, data in members:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize(
    "scheme", ["pipe:touch {}", "http://127.0.0.1/{}", "file:{}", "gs:{}", "PIPE:touch {}"]
)
def test_urls_and_commands_are_not_paths(canary: Path, scheme: str, tmp_path: Path) -> None:
    value = scheme.format(canary)
    for action in (open_set, index_tars):
        with pytest.raises(UserError, match=r"give |plain path"):
            action(value)
    for source, out in ((value, tmp_path / "out"), (tmp_path, value)):
        with pytest.raises(UserError):
            pack_source(source, out, 8)


@pytest.mark.parametrize(
    "name", ["pipe:touch {}", "../x.tar", "/etc/passwd", "a/b.tar", "x.tar | touch {}", "{{0..9}}.tar"]
)
def test_a_manifest_cannot_name_other_files(make_set: MakeSet, canary: Path, name: str) -> None:
    shard_set = make_set(5)
    path = shard_set.path / "manifest.json"
    data = json.loads(path.read_text())
    data["shards"][0]["name"] = name.format(canary)
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match="is no manifest"):
        open_set(shard_set.path)


def test_a_table_with_pickles_is_refused(make_set: MakeSet, canary: Path) -> None:
    shard_set = make_set(5)
    path = shard_set.path / "samples" / "label.npy"
    np.save(path, np.array([Payload(canary)], object), allow_pickle=True)
    column = Column(size=path.stat().st_size, sha256=hash_file(path))
    manifest: Manifest = shard_set.manifest.model_copy(update={"columns": {**shard_set.manifest.columns, "label": column}})
    manifest = manifest.model_copy(update={"sha256": manifest.content_hash()})
    (shard_set.path / "manifest.json").write_text(manifest.model_dump_json())
    with pytest.raises(UserError, match=r"label\.npy cannot be read"):
        open_set(shard_set.path).samples["label"]


@pytest.mark.parametrize("suffix", ["pkl", "pickle", "pyd", "pth", "pkl.gz", "npy", "pt", "txt"])
def test_members_that_are_neither_image_nor_label_are_refused(tmp_path: Path, canary: Path, suffix: str) -> None:
    write_tar(tmp_path / "in" / "a.tar", [("a.png", png()), (f"a.{suffix}", pickle.dumps(Payload(canary)))])
    with pytest.raises(UserError, match=r"a\.tar: member .* is neither an image"):
        index_tars(tmp_path / "in", channels=1)


@pytest.mark.parametrize(
    "name", ["../a.png", "/a.png", "a/../../b.png", "a\nb.png", "a b.png", "~/a.png", ".png", "é.png"]
)
def test_unsafe_keys_are_refused(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "in" / "a.tar", [(name, png())])
    with pytest.raises(UserError, match=r"a\.tar"):
        index_tars(tmp_path / "in", channels=1)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("b.png")
    member.type, member.linkname = kind, "/etc/passwd"
    write_tar(tmp_path / "in" / "a.tar", [("a.png", png()), (member, b"")])
    with pytest.raises(UserError, match=r"member 'b\.png' is a "):
        index_tars(tmp_path / "in", channels=1)


def test_duplicates_are_refused(tmp_path: Path) -> None:
    for number, members in enumerate((["a.png", "a.png"], ["a.png", "b.png", "a.cls"], ["a.png", "a.jpg"])):
        write_tar(tmp_path / str(number) / "a.tar", [(name, png()) for name in members])
        with pytest.raises(UserError, match=r"occurs twice|has 2 images"):
            index_tars(tmp_path / str(number), channels=1)
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / "copies" / name, [("a.png", png())])
    with pytest.raises(UserError, match="are the same"):
        index_tars(tmp_path / "copies", channels=1)


def forge(path: Path, field: slice, value: bytes) -> None:
    """Overwrites a field of the first header and makes its checksum hold again."""
    data = bytearray(path.read_bytes())
    data[field] = value
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()
    path.write_bytes(data)


@pytest.mark.parametrize("size", [b"-0000001000\0", b"\xff" * 12, b"77777777777\0", b"\x80" + b"\0" * 10 + b"\x10"])
def test_negative_and_absurd_sizes_are_refused(tmp_path: Path, size: bytes) -> None:
    path = write_tar(tmp_path / "in" / "a.tar", [("a.png", png()), ("b.png", png(1))])
    forge(path, slice(124, 136), size)
    with pytest.raises(DamagedShard, match=r"a\.tar is damaged at byte 0"):
        index_tars(tmp_path / "in", channels=1)


def test_a_damaged_foreign_tar_drops_no_sample(tmp_path: Path) -> None:
    """webdataset reads the samples before a damaged header and says nothing of the others."""
    path = write_tar(tmp_path / "in" / "a.tar", [(f"{i}.png", png(i)) for i in range(5)])
    original = path.read_bytes()
    with tarfile.open(path) as tar:
        header = [member.offset for member in tar][3]
    for data in (
        original[: header + 700],
        original[:header],
        original[:header] + bytes(512) + original[header + 512 :],
    ):
        path.write_bytes(data)
        with pytest.raises(DamagedShard, match=r"a\.tar is damaged at byte"):
            index_tars(tmp_path / "in", channels=1)


def test_hidden_names_and_compressed_tars_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "in" / "a.tar", [("x" * 150 + ".png", png())], format=tarfile.PAX_FORMAT)
    with pytest.raises(UserError, match="ustar format"):
        index_tars(tmp_path / "in", channels=1)
    with tarfile.open(path, "w:xz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(DamagedShard):
        index_tars(tmp_path / "in", channels=1)


def test_a_foreign_set_is_indexed_and_read(tmp_path: Path) -> None:
    root = tmp_path / "in"
    write_tar(root / "a.tar", [("x/1.cls", b"1"), ("x/1.png", png(1)), ("x/2.png", png(2))])
    write_tar(
        root / "b.tar", [("3.PNG", png(3)), ("3.json", b'{"label": 4, "caption": "x"}')], format=tarfile.GNU_FORMAT
    )
    before = {path.name: path.read_bytes() for path in root.iterdir()}
    shard_set = index_tars(root, channels=1)
    verify(shard_set)
    assert shard_set.samples["label"].tolist() == [1, -1, 4] and len(shard_set.manifest.classes) == 5
    images, _ = load_images(shard_set, [0, 1, 2])
    assert np.array_equal(images.numpy(), np.stack([picture(i) for i in (1, 2, 3)]))
    assert all((root / name).read_bytes() == data for name, data in before.items())
    with pytest.raises(UserError, match="exists already"):
        index_tars(root, channels=1)
    index_tars(root, channels=1, overwrite=True)


def test_foreign_labels_and_sizes_are_checked(tmp_path: Path) -> None:
    cases = [
        ([("a.png", png()), ("a.cls", b"dog")], "holds no label"),
        ([("a.png", png()), ("a.cls", b"-7")], "holds no label"),
        ([("a.png", png()), ("a.cls", b"9999999")], "over the cap"),
        ([("a.png", png()), ("a.json", b"[" * 60000)], "holds no label"),
        ([("a.cls", b"1")], "has 0 images"),
        ([("a.png", png()), ("b.png", encode_png(picture(1, side=9)))], "differ in size"),
        ([], "no sample"),
    ]
    for number, (members, word) in enumerate(cases):
        write_tar(tmp_path / str(number) / "a.tar", members)
        with pytest.raises(UserError, match=word):
            index_tars(tmp_path / str(number), channels=1)
    with pytest.raises(UserError, match=r"holds no \.tar file"):
        index_tars(tmp_path)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side: int) -> bytes:
    rows = zlib.compress(bytes((side // 8 + 1) * side), 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [5000, 10_000, 14_000])
def test_a_png_bomb_is_an_error(side: int) -> None:
    data = bomb(side)
    assert len(data) < 40_000
    with pytest.raises(BadImage, match=r"over the cap|bomb"):
        decode_image(data, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_short_way_of_decoding_accepts_and_refuses_what_pillow_does(channels: int) -> None:
    """Bytes of a plain PNG, some spoilt with checksums that hold, so that only the decoder can notice."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    def outcome(way: str, data: bytes) -> bytes | None:
        out = np.full((channels, 8, 8), 77, np.uint8)
        try:
            if way == "short":
                decode_into(out, data)
            else:
                out = decode_image(data, channels)
        except BadImage:
            return None
        return out.tobytes() if out.shape == (channels, 8, 8) else None

    rng = np.random.default_rng(channels)
    rows = b"".join(bytes([row % 5]) + rng.bytes(8 * channels) for row in range(8))
    whole = zlib.compress(rows)
    flipped = [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in range(len(whole))]
    streams = [whole, zlib.compress(rows[:30]), zlib.compress(rows * 2), zlib.compress(b"\x09" + rows[1:]), whole[:-4]]
    streams += [whole[: len(whole) // 2], whole + b"more", b"", b"not compressed", *flipped]
    kind = 0 if channels == 1 else 2
    heads = [struct.pack(">IIBBBBB", 8, 8, 8, *rest) for rest in ((kind, 0, 0, 0), (2 - kind, 0, 0, 0), (kind, 0, 0, 1))]
    for number, (stream, head) in enumerate([(stream, heads[0]) for stream in streams] + [(whole, head) for head in heads]):
        for extra in (b"", chunk(b"tEXt", b"a\0b"), chunk(b"tRNS", bytes(2 * channels))):
            third = len(stream) // 3
            body = chunk(b"IDAT", stream[:third]) + chunk(b"IDAT", stream[third:])
            data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + body + chunk(b"IEND", b"")
            assert outcome("short", data) == outcome("whole", data), (number, extra)
    assert outcome("short", encode_png(np.zeros((channels, 8, 8), np.uint8))) == bytes(64 * channels)


def test_a_webp_canvas_bomb_is_an_error_before_pillow_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    canvas = (16382).to_bytes(3, "little")
    data = b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas + canvas + bytes(8)
    monkeypatch.setattr(Image, "open", lambda *_a, **_k: pytest.fail("opened"))
    with pytest.raises(BadImage, match="16383 x 16383 pixels"):
        decode_image(data, 3)


def test_only_allowed_formats_are_decoded_whatever_the_name(tmp_path: Path, canary: Path) -> None:
    eps = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(touch {canary}) (w) file\n%%EOF\n".encode()
    tiff, gif = io.BytesIO(), io.BytesIO()
    Image.new("L", (8, 8)).save(tiff, "TIFF")
    Image.new("L", (8, 8)).save(gif, "GIF")
    for number, data in enumerate((eps, tiff.getvalue(), gif.getvalue(), b"", b"\x89PNG\r\n\x1a\n")):
        with pytest.raises(BadImage):
            decode_image(data, 1)
        write_tar(tmp_path / str(number) / "a.tar", [("a.png", data)])
        with pytest.raises(DamagedShard, match=r"a\.tar"):
            index_tars(tmp_path / str(number), channels=1)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(eps)
    with pytest.raises(UserError, match=r"a\.png \(not a readable PNG"):
        pack_source(tmp_path / "in", tmp_path / "out", 8)


def test_byte_cap_animations_and_odd_modes() -> None:
    with pytest.raises(BadImage, match="over the cap of 10"):
        decode_image(png(), 1, max_bytes=10)
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    with pytest.raises(BadImage, match="animation"):
        decode_image(buffer.getvalue(), 3)
    with pytest.raises(UserError, match="channels must be"):
        decode_image(png(), 2)


def test_no_variable_of_the_environment_reaches_the_reader(
    make_set: MakeSet, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard_set = make_set(5)
    for name in ("GOPEN_REWRITE", "WDS_CACHE", "USE_AIS_FOR", "WDS_SECURE", "WDS_SEED"):
        monkeypatch.setenv(name, f"/=pipe:touch {canary};")
    assert len(load_images(open_set(shard_set.path), np.arange(5))[0]) == 5
    make_set(5, name="again")
