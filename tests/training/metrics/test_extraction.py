"""Features over workers: the bits of one process, kept by what they were computed of, and computed again when damaged."""

from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_shards import load_images, open_set
from tests.toy import toy_set
from training.metrics import extraction
from training.metrics.encoder import Encoder, save_encoder
from training.metrics.extraction import image_features, moments_of, set_features, set_moments
from training.metrics.features import FeatureNet, load_feature_net
from training.metrics.frechet import moments


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FeatureNet:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(extraction, "CHUNK", 16)
    torch.manual_seed(0)
    save_encoder(Encoder(1, 16, 2, width=8, features=8), tmp_path / "encoder.safetensors")
    return load_feature_net("encoder", tmp_path / "encoder.safetensors")


@pytest.fixture
def place(tmp_path: Path) -> str:
    toy_set(tmp_path / "toy", train=70, reference=10)
    return str(tmp_path / "toy")


def single_thread() -> None:
    torch.set_num_threads(1)


def over_processes(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=single_thread) as pool:
        return list(pool.map(function, items))


def test_workers_give_the_bits_of_one_process(net: FeatureNet, place: str) -> None:
    ids = open_set(place).indices("train")
    one, many = set_features(place, ids, net), set_features(place, ids, net, over_processes)
    assert torch.equal(one, many)
    whole, merged = set_moments(place, ids, net), set_moments(place, ids, net, over_processes)
    for ours in (merged, moments_of(one)):
        assert ours.images == whole.images == 70
        assert torch.equal(ours.mean, whole.mean) and torch.equal(ours.scatter, whole.scatter)
    plain = moments(one)
    torch.testing.assert_close(whole.mean, plain.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.scatter, plain.scatter, rtol=1e-12, atol=1e-12)


def test_the_order_is_that_of_the_ids(net: FeatureNet, place: str) -> None:
    ids = [40, 3, 77, 3]
    torch.testing.assert_close(set_features(place, ids, net), net.extract(load_images(open_set(place), ids)[0]))


def counted(monkeypatch: pytest.MonkeyPatch, worth: float) -> list[int]:
    calls: list[int] = []
    extract = FeatureNet.extract

    def counting(self: FeatureNet, images: torch.Tensor, batch: int = 256) -> torch.Tensor:
        calls.append(len(images))
        return extract(self, images, batch)

    monkeypatch.setattr(FeatureNet, "extract", counting)
    monkeypatch.setattr(extraction, "WORTH_KEEPING_S", worth)
    return calls


def test_features_are_computed_once(net: FeatureNet, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch, worth=-1.0)
    ids = np.arange(32)
    first = set_features(place, ids, net)
    assert calls == [16, 16]
    assert torch.equal(set_features(place, ids, net), first) and len(calls) == 2
    set_features(place, ids[:16], net)
    assert len(calls) == 3, "other images are other features"
    torch.manual_seed(1)
    save_encoder(Encoder(1, 16, 2, width=8, features=8), tmp_path / "other.safetensors")
    other = load_feature_net("encoder", tmp_path / "other.safetensors")
    assert not torch.equal(set_features(place, ids, other), first), "another net has other features"
    images = load_images(open_set(place), ids)[0]
    before = len(calls)
    assert torch.equal(image_features(images, net), image_features(images.clone(), net)) and len(calls) == before + 1
    images[0, 0, 0, 0] ^= 1
    image_features(images, net)
    assert len(calls) == before + 2


def test_damaged_files_are_computed_again(net: FeatureNet, place: str, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch, worth=-1.0)
    first = set_features(place, range(16), net)
    (kept,) = (tmp_path / "cache" / "features").iterdir()
    data = kept.read_bytes()
    for broken in (data[:-3], data[:-3] + bytes([data[-3] ^ 1]) + data[-2:], b""):
        kept.write_bytes(broken)
        assert torch.equal(set_features(place, range(16), net), first)
    assert len(calls) == 4


def test_only_what_took_its_time_is_kept_and_not_without_end(net: FeatureNet, place: str, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache" / "features"
    counted(monkeypatch, worth=60.0)
    set_features(place, range(16), net)
    assert not folder.exists()
    monkeypatch.setattr(extraction, "WORTH_KEEPING_S", -1.0)
    set_features(place, range(16), net)
    size = next(folder.iterdir()).stat().st_size
    monkeypatch.setattr(extraction, "MOST_KEPT_BYTES", 2 * size)
    for start in range(1, 6):
        set_features(place, range(start, start + 16), net)
    assert len(list(folder.iterdir())) == 2
