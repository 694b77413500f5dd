"""Every kind of source gives the same pictures and labels, in any process, and says what is wrong in one sentence."""

from __future__ import annotations

import csv
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image

from data_shards import ShardSet, UserError, load_images, pack_arrays, pack_source
from data_shards.images import encode_png
from data_shards.packing.copies import exact_copies, hashes64, near_pairs, thumbnail
from data_shards.packing.shard import TarFile
from data_shards.sources import Options, open_source
from tests.data_shards.conftest import picture

COUNT = 12
CLASSES = ("bird", "cat", "dog")


def label(number: int) -> int:
    return number % 3


def name(number: int) -> str:
    return f"{CLASSES[label(number)]}/img {number:02d}.png"


def png(number: int) -> bytes:
    return encode_png(picture(number, 3))


def table() -> str:
    text = io.StringIO()
    csv.writer(text).writerows([("file", "label"), *((f"{i:02d}.png", CLASSES[label(i)]) for i in range(COUNT))])
    return text.getvalue()


def make_folder(root: Path) -> Path:
    for i in range(COUNT):
        (root / "in" / name(i)).parent.mkdir(parents=True, exist_ok=True)
        (root / "in" / name(i)).write_bytes(png(i))
    return root / "in"


def make_flat_folder(root: Path) -> Path:
    (root / "in").mkdir(parents=True)
    for i in range(COUNT):
        (root / "in" / f"{i:02d}.png").write_bytes(png(i))
    (root / "in" / "labels.csv").write_text(table(), encoding="utf-8-sig")
    return root / "in"


def make_zip(root: Path, method: int = zipfile.ZIP_DEFLATED, head: str = "") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(root / "in.zip", "w", method) as archive:
        for i in range(COUNT):
            archive.writestr(head + name(i), png(i))
        archive.writestr("__MACOSX/._x.png", b"")
        archive.writestr("readme.txt", b"")
    return root / "in.zip"


def make_tar(root: Path, mode: str = "", head: str = "", form: int = tarfile.PAX_FORMAT) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"in.tar{mode and '.' + mode}"
    with tarfile.open(path, f"w:{mode}", format=form) as archive:  # type: ignore[call-overload]
        for i in range(COUNT):
            info = tarfile.TarInfo(head + name(i))
            info.size = len(png(i))
            archive.addfile(info, io.BytesIO(png(i)))
    return path


def make_flat_tar(root: Path) -> Path:
    root.mkdir(parents=True)
    with tarfile.open(root / "in.tar", "w") as archive:
        for file, data in [*((f"x/{i:02d}.png", png(i)) for i in range(COUNT)), ("x/labels.csv", table().encode())]:
            info = tarfile.TarInfo(file)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return root / "in.tar"


def make_arrays(root: Path, save: Callable[..., None] = np.savez, first: bool = False, text: bool = False) -> Path:
    root.mkdir(parents=True)
    images = np.stack([picture(i, 3) for i in range(COUNT)])
    labels = np.array([label(i) for i in range(COUNT)])
    save(root / "in.npz", images=images if first else images.transpose(0, 2, 3, 1),
         labels=np.array(CLASSES)[labels] if text else labels)
    return root / "in.npz"


def make_npy(root: Path) -> Path:
    root.mkdir(parents=True)
    np.save(root / "in.npy", np.stack([picture(i, 3) for i in range(COUNT)]))
    np.save(root / "labels.npy", np.array([label(i) for i in range(COUNT)], np.uint8))
    return root / "in.npy"


def make_parquet(root: Path, struct: bool = True, text: bool = False, files: int = 1) -> Path:
    root.mkdir(parents=True)
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(CLASSES)}}
    data: list[Any] = [{"bytes": png(i), "path": None} if struct else png(i) for i in range(COUNT)]
    labels: list[Any] = [CLASSES[label(i)] if text else label(i) for i in range(COUNT)]
    content = pa.table({"image": data, "label": labels, "caption": ["x"] * COUNT})
    if struct:
        content = content.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    step = COUNT // files
    for number in range(files):
        part = content.slice(number * step, step)
        pq.write_table(part, root / (f"train-{number:05d}.parquet" if files > 1 else "in.parquet"), row_group_size=5)
    return root if files > 1 else root / "in.parquet"


def make_webdataset(root: Path, suffix: str = "cls", files: int = 2) -> Path:
    root.mkdir(parents=True)
    for number in range(files):
        with wds.TarWriter(str(root / f"{number}.tar"), encoder=False) as writer:
            for i in range(number, COUNT, files):
                word = CLASSES[label(i)]
                value = {"cls": str(label(i)), "txt": word, "json": json.dumps({"label": word})}[suffix]
                writer.write({"__key__": f"s/{i:04d}", "png": png(i), suffix: value.encode(), "npy": b"never read"})
    return root if files > 1 else root / "0.tar"


SOURCES: dict[str, Callable[[Path], Path]] = {
    "folder": make_folder,
    "folder with labels.csv": make_flat_folder,
    "zip": make_zip,
    "zip, stored, in a folder": lambda root: make_zip(root, zipfile.ZIP_STORED, "wrapped/"),
    "tar": make_tar,
    "tar.gz, in a folder": lambda root: make_tar(root, "gz", "wrapped/"),
    "tar.xz": lambda root: make_tar(root, "xz"),
    "tar.bz2, GNU, long names": lambda root: make_tar(root, "bz2", f"{'x' * 150}/", tarfile.GNU_FORMAT),
    "tar, pax, long names": lambda root: make_tar(root, "", f"{'x' * 150}/"),
    "tar with labels.csv": make_flat_tar,
    "npz, channels last": make_arrays,
    "npz, channels first, compressed, names": lambda root: make_arrays(root, np.savez_compressed, True, True),
    "npy and labels.npy": make_npy,
    "parquet of Hugging Face": make_parquet,
    "parquet of bytes": lambda root: make_parquet(root, struct=False, text=True),
    "folder of parquet": lambda root: make_parquet(root, files=3),
    "WebDataset, cls": make_webdataset,
    "WebDataset, json": lambda root: make_webdataset(root, "json"),
    "WebDataset, txt, one tar": lambda root: make_webdataset(root, "txt", 1),
}


def truth(shard_set: ShardSet) -> set[tuple[bytes, str]]:
    """(pixels, class) of every sample, whatever the order."""
    images, labels = load_images(shard_set, range(len(shard_set)))
    classes = shard_set.manifest.classes
    return {(image.tobytes(), classes[int(label)]) for image, label in zip(images.numpy(), labels, strict=True)}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_pictures_and_labels(tmp_path: Path, kind: str) -> None:
    source = SOURCES[kind](tmp_path / "in")
    one = pack_source(source, tmp_path / "one", 8, 3, shard_samples=5, name="x")
    classes = one.manifest.classes
    names = CLASSES if set(classes) == set(CLASSES) else ("0", "1", "2")
    assert set(classes) == set(names) and len(one) == COUNT
    assert truth(one) == {(picture(i, 3).tobytes(), names[label(i)]) for i in range(COUNT)}
    two = pack_source(source, tmp_path / "two", 8, 3, shard_samples=5, name="x", processes=2)
    assert one.manifest == two.manifest
    assert {path.name for path in tmp_path.iterdir()} == {"in", "one", "two"}


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "npz, channels last", "WebDataset, cls"])
def test_parts_are_small_and_can_be_pickled(tmp_path: Path, kind: str) -> None:
    source = open_source(SOURCES[kind](tmp_path / "in"), Options(tmp_path / "scratch"))
    part = source.part(np.array([3, 1]))
    first = part.read(0)
    again = pickle.loads(pickle.dumps(part))
    assert list(again.names) == list(part.names) and again.read(0) == first != again.read(1)
    again.close()
    part.close()
    assert part.read(0) == first
    part.close()
    assert len(pickle.dumps(source.part(np.arange(COUNT)))) < 4000


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    np.save(tmp_path / "float.npy", np.zeros((3, 8, 8), np.float32))
    np.save(tmp_path / "flat.npy", np.zeros((3, 64), np.uint8))
    np.savez(tmp_path / "two.npz", train=np.zeros((3, 8, 8), np.uint8), test=np.zeros((2, 8, 8), np.uint8))
    np.savez(tmp_path / "labels.npz", images=np.zeros((3, 8, 8), np.uint8), a=np.arange(3), b=np.arange(3))
    pq.write_table(pa.table({"a": [b"x"], "b": [b"y"]}), tmp_path / "two.parquet")
    pq.write_table(pa.table({"image": [b"x"], "label": [[1]]}), tmp_path / "nested.parquet")
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "none.parquet")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty.zip").write_bytes(b"PK\5\6" + bytes(18))
    for file in ("bad.zip", "bad.tar", "bad.npz", "bad.npy", "bad.parquet", "bad.tar.gz"):
        (tmp_path / file).write_bytes(b"\x1f\x8b nothing of the kind" * 40)
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("float.npy", {}, "are float32; save them as uint8"),
        ("flat.npy", {}, "0 arrays of images"),
        ("two.npz", {}, "2 arrays of images .*--image-column"),
        ("two.npz", {"image_column": "x"}, "no array 'x'; its arrays: train, test"),
        ("labels.npz", {}, "may be labels .a, b.; use --label-column"),
        ("two.parquet", {}, "2 columns of images among a, b; use --image-column"),
        ("two.parquet", {"image_column": "c"}, "no column 'c'; its columns: a, b"),
        ("none.parquet", {"image_column": "text"}, "is string, not bytes"),
        ("nested.parquet", {}, "labels are integers or strings"),
        ("notes.txt", {}, "is not a folder of images, nor a file called .zip"),
        ("empty.zip", {}, "holds no image"),
        ("missing.zip", {}, "there is no folder or file"),
        ("bad.zip", {"kind": "film"}, "kind 'film' of source"),
        *((f"bad.{suffix}", {}, "cannot be read|damaged") for suffix in ("zip", "tar", "npz", "npy", "parquet", "tar.gz")),
    ]  # fmt: skip
    for file, options, word in cases:
        with pytest.raises(UserError, match=word) as caught:
            pack_source(tmp_path / file, tmp_path / "out", 8, **options)
        assert "\n" not in str(caught.value), file
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_captions_are_no_labels(tmp_path: Path) -> None:
    with wds.TarWriter(str(tmp_path / "in.tar"), encoder=False) as writer:
        for i in range(COUNT):
            writer.write({"__key__": f"{i}", "jpg": png(i), "txt": f"a picture of {i}".encode()})
    assert pack_source(tmp_path / "in.tar", tmp_path / "out", 8).manifest.classes == ()


def test_a_table_may_lack_images(tmp_path: Path) -> None:
    column = [{"bytes": png(0), "path": "0.png"}, {"bytes": None, "path": "/etc/passwd"}, None, {"bytes": b"", "path": None}]
    pq.write_table(pa.table({"image": column, "label": [0, 1, -1, None]}), tmp_path / "in.parquet")
    shard_set = pack_source(tmp_path / "in.parquet", tmp_path / "out", 8, max_bad=3)
    assert len(shard_set) == 1 and [file for file, _ in shard_set.manifest.bad] == [f"in.parquet[{i}]" for i in (1, 2, 3)]
    assert "a path or a URL is not followed" in shard_set.manifest.bad[0][1]


@pytest.mark.parametrize(("encoding", "suffix"), [("png", "png"), ("webp", "webp"), ("jpeg", "jpg")])
@pytest.mark.parametrize("channels", [1, 3])
def test_encodings(tmp_path: Path, encoding: str, suffix: str, channels: int) -> None:
    shard_set = pack_arrays(lambda i: (picture(i, channels, 16), -1), 5, tmp_path / "out", name="x", identity="",
                            shape=(channels, 16, 16), encoding=encoding, quality=100)  # fmt: skip
    images, _ = load_images(shard_set, range(5))
    numbers = [int(key) for key in shard_set.samples["key"]]
    truth = np.stack([picture(i, channels, 16) for i in numbers])
    error = np.abs(images.numpy().astype(int) - truth).max()
    assert error == 0 if encoding != "jpeg" else 0 < error < 16
    assert shard_set.manifest.suffixes == (suffix,) and encoding.upper() in shard_set.manifest.packing["encoding"].upper()
    with tarfile.open(shard_set.shard_path(0)) as tar:
        assert {member.name.rpartition(".")[2] for member in tar} == {suffix}


def test_nothing_but_pixels_goes_into_a_shard(tmp_path: Path) -> None:
    """Not even of a picture that is in its final form already."""
    secret = b"SECRET-48.137-11.575"
    exif = Image.Exif()
    exif[0x010E] = secret.decode()
    (tmp_path / "in").mkdir()
    image = Image.fromarray(picture(0, 3).transpose(1, 2, 0))
    for suffix in ("png", "jpg", "webp"):
        path = tmp_path / "in" / f"{suffix}.{suffix}"
        extra: dict[str, Any] = {"comment": secret} if suffix == "jpg" else {}
        image.save(path, exif=exif, icc_profile=secret, **extra)
        path.write_bytes(path.read_bytes() + secret)
    for encoding in ("png", "jpeg", "webp"):
        shard_set = pack_source(tmp_path / "in", tmp_path / encoding, 8, encoding=encoding, keep_duplicates=True)
        assert len(shard_set) == 3 and secret not in shard_set.shard_path(0).read_bytes()


def test_tars_are_those_of_webdataset(tmp_path: Path) -> None:
    for count in (1, 9, 40):
        theirs, ours = io.BytesIO(), io.BytesIO()
        with wds.TarWriter(theirs, encoder=False, mtime=0, compress=False) as writer:
            writer.tarstream.format = tarfile.USTAR_FORMAT
            for i in range(count):
                writer.write({"__key__": f"a/{i}", "png": bytes(i * 37), "cls": b"1"})
        tar = TarFile(ours)
        for i in range(count):
            tar.add(f"a/{i}.cls", b"1")
            tar.add(f"a/{i}.png", bytes(i * 37))
        tar.end()
        assert ours.getvalue() == theirs.getvalue() and len(ours.getvalue()) == tar.size


def test_copies_leave_train_before_they_leave_reference(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "x")
    for i in range(6):  # copies in other formats and of other classes are copies
        Image.open(root / name(i)).save(root / "dog" / f"zz copy {i}.webp", lossless=True)
    kept = pack_source(root, tmp_path / "kept", 8, 3, reference=0.5, keep_duplicates=True)
    assert len(kept) == 18 and not (kept.path / "duplicates.csv").exists()
    shard_set = pack_source(root, tmp_path / "out", 8, 3, reference=0.5)
    assert len(shard_set) == 12 and shard_set.manifest.duplicates == 6
    with (shard_set.path / "duplicates.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert len(listed) == 6 and all(row["left_out"] != row["kept"] for row in listed)
    assert all(row["kept_split"] == "reference" for row in listed if row["split"] == "reference")
    images, _ = load_images(shard_set, range(12))
    assert len({image.tobytes() for image in images.numpy()}) == 12
    drawn = dict(zip(kept.samples["key"].tolist(), kept.samples["split"].tolist(), strict=True))
    for key, split in zip(shard_set.samples["key"].tolist(), shard_set.samples["split"].tolist(), strict=True):
        assert drawn[key] == split, "the draw precedes everything else"


def test_exact_copies_by_hand() -> None:
    hashes = np.array([[1, 1], [2, 1], [1, 1], [1, 2], [2, 1], [2, 1]], np.uint64)
    splits, indices = np.array([0, 0, 1, 0, 0, 0], np.uint8), np.array([5, 9, 7, 1, 3, 4])
    assert exact_copies(hashes, splits, indices).tolist() == [2, 4, 2, 3, 4, 4]


@pytest.mark.parametrize("mask", [2**64 - 1, 0xFFF00000FFF])
@pytest.mark.parametrize("distance", [0, 1, 4, 8])
def test_near_pairs_are_all_found(distance: int, mask: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where few bits vary, and many rows share their bands."""
    monkeypatch.setattr("data_shards.packing.copies.BLOCK_ROWS", 7)
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**63, 60, dtype=np.uint64) & np.uint64(mask)
    chosen = [rng.choice(64, count, replace=False) for count in rng.integers(0, 11, 60)]
    flips = np.array([sum(1 << int(bit) for bit in bits) for bits in chosen], np.uint64)
    hashes = np.concatenate([base, base ^ flips, base[:5]])
    pairs, bits, capped = near_pairs(hashes, distance)
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None])
    first = {value: row for row, value in reversed(list(enumerate(hashes.tolist())))}
    expected = {(i, j) for i in range(len(hashes)) for j in range(i + 1, len(hashes))
                if apart[i, j] <= distance and (first[int(hashes[j])] == j or apart[i, j] == 0) and first[int(hashes[i])] == i}
    assert {tuple(pair) for pair in pairs.tolist()} == expected and not capped
    assert bits.tolist() == sorted(apart[i, j] for i, j in expected)


def test_near_copies_are_listed_with_their_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "x")
    for i in range(COUNT):
        smooth = np.linspace(0, 255, 64).reshape(8, 8)[:, :: (-1) ** i] * (i + 1) / COUNT
        Image.fromarray(smooth.astype(np.uint8)).resize((64, 64)).save(root / name(i))
    shard_set = pack_source(root, tmp_path / "out", 32, 1, reference=0.5)
    assert shard_set.manifest.packing["near_pairs"] > 0 and not shard_set.manifest.packing["near_pairs_capped"]
    with (shard_set.path / "near_duplicates.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert len(listed) == shard_set.manifest.packing["near_pairs"]
    crossing = [row for row in listed if row["split"] != row["other_split"]]
    assert crossing == [row for row in listed if row["crosses_splits"] == "yes"]
    assert len(crossing) == shard_set.manifest.packing["near_pairs_crossing"]
    monkeypatch.setattr("data_shards.packing.copies.MAX_PAIRS", 2)
    capped = pack_source(root, tmp_path / "capped", 32, 1)
    assert capped.manifest.packing["near_pairs"] == 2 and capped.manifest.packing["near_pairs_capped"]
    assert "near_pairs" not in pack_source(root, tmp_path / "none", 32, 1, near=-1).manifest.packing


def test_the_perceptual_hash_by_hand() -> None:
    ramp = Image.fromarray(np.tile(np.arange(72, dtype=np.uint8), (64, 1)))
    flat = Image.new("RGB", (20, 20), (9, 9, 9))
    assert hashes64([thumbnail(ramp), thumbnail(flat)], 2).tolist() == [2**64 - 1, 0]


def test_generated_arrays_carry_their_provenance(tmp_path: Path) -> None:
    made = {"checkpoint": "runs/a/step-1", "sha256": "ab", "seed": 3, "truncation": 0.7}
    shard_set = pack_arrays(lambda i: (picture(i), i % 2), 20, tmp_path / "out", name="generated", shape=(1, 8, 8),
                            identity="a", classes=("x", "y"), provenance=made, shard_samples=6)  # fmt: skip
    assert shard_set.manifest.provenance == made
    for key, number in zip(shard_set.samples["key"].tolist(), shard_set.samples["label"].tolist(), strict=True):
        assert int(key) % 2 == number
    with pytest.raises(UserError, match=r"shape is \(1, 9, 9\)"):
        pack_arrays(lambda i: (picture(9, side=9), -1), 1, tmp_path / "bad", name="x", shape=(1, 8, 8), identity="a")
    with pytest.raises(UserError, match="cannot be made"):
        pack_arrays(lambda i: (picture(i), 0), 0, tmp_path / "bad", name="x", shape=(1, 8, 8), identity="a")
