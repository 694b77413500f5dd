"""Images to sets: plain tars, reproducible bytes, splits, bad images, user errors."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from data_shards import Sample, UserError, info, load_images, open_set, pack_images, pack_source, verify
from data_shards.images import decode_image, encode_png, fit_image
from data_shards.packing import place
from tests.data_shards.conftest import MakeSet, picture


def folder_of(root: Path, files: list[str], size: tuple[int, int] = (12, 10)) -> Path:
    for number, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / file)
    return root


def test_plain_webdataset_reads_the_shards(make_set: MakeSet) -> None:
    shard_set = make_set(50)
    urls = [str(shard_set.shard_path(i)) for i in range(len(shard_set.manifest.shards))]
    assert len(urls) == 8
    read = {sample["__key__"]: sample for sample in wds.WebDataset(urls, shardshuffle=False)}
    assert len(read) == 50
    for key, sample in read.items():
        number = int(key[1:])
        assert {name for name in sample if not name.startswith("__")} == {"png", "cls"}
        assert np.array_equal(decode_image(sample["png"], 1), picture(number)) and int(sample["cls"]) == number % 5


def test_the_same_input_gives_the_same_bytes(make_set: MakeSet) -> None:
    one, two, other = make_set(40, name="a"), make_set(40, name="b"), make_set(40, name="c", seed=1)
    for name in [shard.name for shard in one.manifest.shards] + [f"samples/{column}.npy" for column in one.samples]:
        assert (one.path / name).read_bytes() == (two.path / name).read_bytes()
    assert [s.sha256 for s in one.manifest.shards] != [s.sha256 for s in other.manifest.shards]
    assert not list(one.path.parent.glob(".*")), "nothing temporary is left"


def test_samples_are_mixed_over_the_shards(make_set: MakeSet) -> None:
    keys = make_set(200, shard_samples=50).samples["key"].tolist()
    assert keys != sorted(keys) and len(set(keys)) == 200


def test_shards_keep_their_limits(make_set: MakeSet) -> None:
    assert [shard.samples for shard in make_set(20).manifest.shards] == [7, 7, 6]
    small = make_set(10, name="small", shard_samples=1000, shard_bytes=20_000)
    assert len(small.manifest.shards) == 3 and len(small) == 10
    assert max(shard.size for shard in small.manifest.shards) <= 20_480  # a tar's length is a multiple of 10,240


def test_info_and_verify(make_set: MakeSet) -> None:
    shard_set = make_set(50, licence="CC0", source="made here")
    content = info(shard_set)
    assert json.loads(json.dumps(content)) == content
    assert content["samples"] == 50 and content["splits"] == {"train": 45, "reference": 5}
    assert content["licence"] == "CC0" and content["classes"]["class-0"] == 10 and content["image_shape"] == [1, 8, 8]
    seen: list[tuple[int, int]] = []
    verify(shard_set, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (8, 8)


def test_splits_and_labels(make_set: MakeSet) -> None:
    shard_set = make_set(50)
    train, reference = shard_set.indices("train"), shard_set.indices("reference")
    assert not np.intersect1d(train, reference).size and len(train) == 45 and len(reference) == 5
    assert np.array_equal(shard_set.indices(label="class-2"), shard_set.indices(label=2))
    with pytest.raises(UserError, match="no class 'dog'; its classes are: class-0"):
        shard_set.indices(label="dog")


def test_labels_come_from_subfolders(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "in", [f"{c}/img {i}.png" for c in ("dog", "cat") for i in range(3)])
    (root / "notes.txt").write_text("not an image")
    shard_set = pack_source(root, tmp_path / "out", 8, 3)
    assert shard_set.manifest.classes == ("cat", "dog") and shard_set.manifest.image_shape == (3, 8, 8)
    for key, label in zip(shard_set.samples["key"].tolist(), shard_set.samples["label"].tolist(), strict=True):
        assert (b"cat" in key) == (label == 0)
    images, _ = load_images(shard_set, [0])
    number = int(shard_set.samples["key"][0].split(b"-")[0])
    file = sorted(p for p in root.rglob("*.png"))[number]
    assert np.array_equal(images[0].numpy(), fit_image(Image.open(file), (8, 8), 3))


def test_labels_come_from_a_table_or_not_at_all(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "in", ["a.png", "b.jpg", "c.webp"])
    assert pack_source(root, tmp_path / "none", 8, 1).samples["label"].tolist() == [-1, -1, -1]
    rows = [("a.png", "x"), ("b.jpg", "y"), ("c.webp", "x")]
    write_table(root, rows)
    assert pack_source(root, tmp_path / "table", 8, 1).manifest.classes == ("x", "y")
    write_table(root, rows[:2])
    with pytest.raises(UserError, match=r"no row for c\.webp"):
        pack_source(root, tmp_path / "lacking", 8, 1)
    write_table(root, [*rows, ("d.png", "x")])
    with pytest.raises(UserError, match=r"line 5 names 'd\.png'"):
        pack_source(root, tmp_path / "extra", 8, 1)


def write_table(root: Path, rows: list[tuple[str, str]]) -> None:
    with (root / "labels.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("file", "label"), *rows])


def test_images_beside_subfolders_are_ambiguous(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"such as a\.png; move"):
        pack_source(folder_of(tmp_path / "in", ["a.png", "x/b.png"]), tmp_path / "out", 8)


def test_a_reference_split_is_held_out_by_seed(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "in", [f"{i:02d}.png" for i in range(20)])
    one, two, other = (
        pack_source(root, tmp_path / f"out{i}", 8, 1, reference=0.25, seed=seed) for i, seed in enumerate((0, 0, 1))
    )
    assert one.manifest.splits == {"train": 15, "reference": 5}
    assert held(one) == held(two) != held(other)
    with pytest.raises(UserError, match="one split of 20 images empty"):
        pack_source(root, tmp_path / "bad", 8, 1, reference=0.01)
    with pytest.raises(UserError, match=r"reference 1\.0"):
        pack_source(root, tmp_path / "bad", 8, 1, reference=1.0)


def held(shard_set: object) -> set[bytes]:
    return set(shard_set.samples["key"][shard_set.indices("reference")].tolist())  # type: ignore[attr-defined]


def test_bad_images_are_listed_counted_and_capped(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "in", [f"{i}.png" for i in range(6)])
    (root / "2.png").write_bytes(b"not a picture")
    (root / "4.png").write_bytes((root / "4.png").read_bytes()[:100])
    (root / "old.bmp").write_bytes(b"BM")
    with pytest.raises(UserError, match=r"more than the 2 bad image\(s\) allowed by --max-bad"):
        pack_source(root, tmp_path / "out", 8, 1, max_bad=2)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    shard_set = pack_source(root, tmp_path / "out", 8, 1, max_bad=3)
    assert len(shard_set) == 4
    assert [file for file, _ in shard_set.manifest.bad] == ["2.png", "4.png", "old.bmp"]
    assert all(reason for _, reason in shard_set.manifest.bad)


def test_user_mistakes_get_one_sentence(tmp_path: Path, make_set: MakeSet) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    root = folder_of(tmp_path / "in", ["a.png"])
    make_set(5, name="there")
    cases = [
        (tmp_path / "missing", "out", "there is no folder"),
        (tmp_path / "empty", "out", "holds no image"),
        (tmp_path / "file", "out", "is not a folder"),
        (root, "there", "exists already"),
        (root, "file/below", "cannot be written"),
    ]
    for source, out, word in cases:
        with pytest.raises(UserError, match=word) as caught:
            pack_source(source, tmp_path / out, 8)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="size 0"):
        pack_source(root, tmp_path / "out", 0)
    with pytest.raises(UserError, match="graft shards fetch NAME"):
        open_set(tmp_path / "missing")
    with pytest.raises(UserError, match="graft shards index"):
        open_set(tmp_path / "empty")


def test_an_unreadable_path_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder_of(tmp_path / "in", ["a/a.png"])

    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"in cannot be read \(Permission denied\)"):
        pack_source(root, tmp_path / "out", 8)


def test_overwriting_replaces_a_set_and_nothing_else(tmp_path: Path, make_set: MakeSet) -> None:
    make_set(20)
    assert len(make_set(5, overwrite=True)) == 5
    assert len(list((tmp_path / "set").glob("*.tar"))) == 1
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="is no set"):
        make_set(5, name="precious", overwrite=True)
    assert (tmp_path / "precious" / "thesis.txt").exists()


def test_a_killed_pack_leaves_no_set_and_the_next_one_works(tmp_path: Path, make_set: MakeSet) -> None:
    draft = tmp_path / ".set.partial"
    draft.mkdir()
    (draft / "shard-000000.tar").write_bytes(b"half")
    with pytest.raises(UserError):
        open_set(tmp_path / "set")
    verify(make_set(10))
    assert not draft.exists()


def test_two_packers_of_one_set_do_not_mix(tmp_path: Path, make_set: MakeSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "LOCK_WAIT_S", 0.1)
    with (
        pytest.raises(UserError, match="another process is writing"),
        place.open_place(tmp_path / "set", False),
    ):
        make_set(10)


def test_keys_labels_and_shapes_are_checked(tmp_path: Path) -> None:
    def pack(*samples: Sample, **options: object) -> None:
        pack_images(samples, tmp_path / "out", name="s", shape=(1, 8, 8), **options)  # type: ignore[arg-type]

    good = Sample("a", picture(0))
    for sample, word in (
        (good._replace(key="../a"), "keys are relative names"),
        (good._replace(key="/a"), "keys are relative names"),
        (good._replace(key="a.b"), "holds a dot"),
        (good._replace(key="a" * 95), "longer than 90"),
        (good._replace(label=0), "has 0 classes"),
        (good._replace(split="test"), "splits are train, reference"),
        (good._replace(image=picture(0, side=9)), r"shape is \(1, 9, 9\)"),
    ):
        with pytest.raises(UserError, match=word):
            pack(sample)
    with pytest.raises(UserError, match="occurs twice"):
        pack(good, good)
    with pytest.raises(UserError, match="no image"):
        pack()


def test_fitting_follows_the_written_policy() -> None:
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 15:25] = (255, 0, 0)  # the centre square
    assert np.array_equal(fit_image(Image.fromarray(wide), (10, 10), 3)[0], np.full((10, 10), 255))
    # Antialiased: a checkerboard of single pixels becomes gray, where nearest or bilinear sampling would alias.
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    assert abs(fit_image(Image.fromarray(board), (8, 8), 1).astype(int) - 127).max() < 12
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (fit_image(clear, (8, 8), 3) == 255).all() and (fit_image(clear, (8, 8), 1, background=0) == 0).all()
    deep = Image.fromarray(np.full((8, 8), 0x8000, np.uint16))
    assert (fit_image(deep, (8, 8), 1) == 0x80).all()
    half = Image.fromarray(np.repeat(np.array([[0] * 8, [255] * 8], np.uint8), 4, axis=0))  # black above white
    exif, turned = Image.Exif(), io.BytesIO()
    exif[0x0112] = 3  # upside down
    half.save(turned, "PNG", exif=exif)
    assert np.array_equal(fit_image(Image.open(turned), (8, 8), 1)[0], np.asarray(half)[::-1])


@pytest.mark.parametrize("channels", [1, 3])
def test_png_is_lossless(channels: int) -> None:
    image = picture(3, channels)
    assert np.array_equal(decode_image(encode_png(image), channels), image)


def test_an_empty_folder_is_filled_and_a_packed_set_is_not_packed_again(make_set: MakeSet, tmp_path: Path) -> None:
    shard_set = make_set(10)
    with pytest.raises(UserError, match="graft shards copy"):
        pack_source(shard_set.path, tmp_path / "again", 8, 1)
    Image.fromarray(picture(0)[0]).save(tmp_path / "one.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "one.png").rename(tmp_path / "in" / "one.png")
    (tmp_path / "empty").mkdir()
    assert len(pack_source(tmp_path / "in", tmp_path / "empty", 8, 1)) == 1
    with pytest.raises(UserError, match="is only read"):
        pack_source(tmp_path / "in", "https://example.org/x", 8, 1)
