"""`graft shards pack`: its options, dry run and lines, and packing over Ray, which gives the same bytes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster import packing
from cluster.cli import main
from cluster.session import ray_session
from data_shards import UserError, open_set, pack_source


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """60 pictures of three classes, one of them a copy and one not a picture, in the working folder."""
    monkeypatch.chdir(tmp_path)
    for i in range(60):
        path = tmp_path / "photos" / "abc"[i % 3] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(max(i, 1)).integers(0, 256, (9, 12, 3), np.uint8)).save(path)
    (tmp_path / "photos" / "a" / "x.png").write_bytes(b"no picture")
    return tmp_path / "photos"


def run(*words: str) -> int:
    return main(["shards", "pack", "photos", "--out", "packed", "--size", "8", *words])


def test_a_dry_run_says_what_would_be_packed(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--reference", "0.5", "--shard-samples", "16", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "photos is of kind folder: 61 images, 3 classes (a, b, c), 30 held out" in said
    assert "packed: 4 shards of at most 16 images, 8 x 8 RGB, png" in said
    assert {path.name for path in photos.parent.iterdir()} == {"photos"}


def test_options_reach_the_set(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--max-bad 1 --encoding jpeg --quality 70 --channels 1 --seed 3 --reference 0.2 --background 0 --shard-samples 10"
             " --name mine --licence CC0 --near 2")
    assert run(*words.split()) == 0
    said = capsys.readouterr().out
    assert "59 images in 6 shards, 1 left out, 1 copies left out" in said and "pairs of near copies listed (" in said
    assert said.count("\n") <= packing.LINES + 3
    manifest = open_set("packed").manifest
    assert (manifest.name, manifest.licence, manifest.image_shape, manifest.suffixes) == ("mine", "CC0", (1, 8, 8), ("jpg",))
    assert manifest.packing["encoding"] == "JPEG, quality 70, 4:4:4" and manifest.packing["seed"] == 3
    assert run("--max-bad", "1", "--keep-duplicates", "--near", "-1", "--overwrite", "--processes", "1") == 0
    assert "0 copies" in capsys.readouterr().out and "near_pairs" not in open_set("packed").manifest.packing


@pytest.mark.parametrize(("words", "said"), [
    (["--encoding", "gif"], "encoding 'gif' does not exist; choose one of png, webp, jpeg"),
    (["--quality", "0"], "quality 0 must be 1 to 100"),
    (["--near", "9"], "near 9 must be a number of bits"),
    (["--background", "256"], "background 256"),
    (["--kind", "zip"], "is a folder, and a source of kind zip is a file"),
    (["--reference", "1"], "reference 1.0"),
    (["--address", "127.0.0.1:1", "--processes", "2"], "give one of them"),
    (["--address", "127.0.0.1:1"], "no Ray cluster at 127.0.0.1:1"),
    ([], "x.png (not a readable PNG"),
])
def test_mistakes_are_one_sentence(photos: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error
    assert not (photos.parent / "packed").exists()


def test_an_interrupted_pack_goes_on(photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("data_shards.pack.finish", interrupt)
    assert run("--max-bad", "1", "--processes", "2", "--shard-samples", "16") == 1
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(photos.parent)
    assert run("--max-bad", "1", "--processes", "2", "--shard-samples", "16") == 0
    assert "going on with an unfinished pack: 4 of 4 shards are there" in capsys.readouterr().out


@pytest.mark.ray
def test_packing_over_ray_gives_the_same_bytes(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = pack_source(photos, tmp_path / "here", 8, max_bad=1, shard_samples=7)
    with ray_session(None, cpus=2):
        there = pack_source(photos, tmp_path / "there", 8, max_bad=1, shard_samples=7, map_fn=packing.over_cluster)
        assert there.manifest == here.manifest
        with pytest.raises(UserError, match=r"more than the 0 bad image\(s\) allowed by --max-bad, such as a/x\.png"):
            pack_source(photos, tmp_path / "bad", 8, map_fn=packing.over_cluster)
        packing._check_seen(photos)
        monkeypatch.setattr(packing, "_sight", lambda _path, _name: (str(os.getpid()), -1))
        with pytest.raises(UserError, match=r"cannot be seen from .*; put SRC on storage"):
            packing._check_seen(photos)
