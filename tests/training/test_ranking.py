"""Which source suits a target: distances that grow as sets part, and the correlation with gains by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_shards import Sample, ShardSet, UserError, load_images, pack_images
from tests.toy import SIZE, stroke_set, toy_set
from training.metrics.encoder import train_encoder
from training.metrics.features import encoder_net
from training.metrics.frechet import frechet_distance
from training.metrics.kid import kid
from training.ranking import mean_ranks, rank_correlation, set_distance, some_images


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardSet]:
    """A target of bars and crosses, the same drawn again, and other sets."""
    root = tmp_path_factory.mktemp("ranking")
    noise = np.random.default_rng(0).integers(0, 256, (48, 1, SIZE, SIZE)).astype(np.uint8)
    return {"target": toy_set(root / "target", train=40), "again": toy_set(root / "again", train=64, seed=1),
            "strokes": stroke_set(root / "strokes"),
            "noise": pack_images([Sample(f"noise-{i}", image, 0) for i, image in enumerate(noise)], root / "noise",
                                 name="noise", shape=(1, SIZE, SIZE), classes=["noise"])}


def test_a_set_like_the_target_is_nearest_and_noise_farthest(sets: dict[str, ShardSet]) -> None:
    images, labels = load_images(sets["target"], sets["target"].indices("train"))
    net = encoder_net(train_encoder(images, labels, classes=2, seed=0, images_budget=1024, threads=1))
    found = {name: set_distance(each, sets["target"], net, limit=40, seed=0) for name, each in sets.items() if name != "target"}
    assert found["again"]["kid"] < found["strokes"]["kid"] < found["noise"]["kid"]
    assert found["again"]["fd"] < min(found["strokes"]["fd"], found["noise"]["fd"])
    near, far = (net.extract(load_images(sets[name], some_images(sets[name], 40, 0))[0]) for name in ("target", "strokes"))
    assert found["strokes"]["kid"] == pytest.approx(kid(far, near)) and found["strokes"]["n_source"] == 40
    assert found["strokes"]["fd"] == pytest.approx(frechet_distance(far, near))
    low, high = found["noise"]["kid_ci95"]
    assert low <= found["noise"]["kid"] <= high


def test_only_training_images_are_compared_and_the_draw_is_the_seeds(sets: dict[str, ShardSet]) -> None:
    chosen = some_images(sets["target"], 10, 3)
    assert set(chosen) <= set(sets["target"].indices("train")) and len(set(chosen)) == 10
    assert chosen.tolist() == some_images(sets["target"], 10, 3).tolist() != some_images(sets["target"], 10, 4).tolist()
    assert len(some_images(sets["target"], 1000, 0)) == 40


def test_a_set_too_small_is_refused(sets: dict[str, ShardSet], tmp_path: Path) -> None:
    net = encoder_net(train_encoder(*load_images(sets["target"], np.arange(8)), classes=2, seed=0, images_budget=64, threads=1))
    with pytest.raises(UserError, match="has 2 training images, and a distance needs 4"):
        set_distance(sets["noise"], toy_set(tmp_path / "small", train=2, reference=2), net, limit=10, seed=0)


def test_the_correlation_is_of_nearness_with_gain() -> None:
    assert rank_correlation([1.0, 2.0, 3.0], [0.3, 0.2, 0.1]) == pytest.approx(1)
    assert rank_correlation([1.0, 2.0, 3.0], [0.1, 0.2, 0.3]) == pytest.approx(-1)
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [4.0, 2.0, 3.0, 1.0]) == pytest.approx(1 - 6 * 2 / (4 * 15))  # by hand
    assert rank_correlation([1.0, 2.0], [2.0, 1.0]) is None and rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None


def test_ranks_are_averaged_over_measures() -> None:
    values = {"kid": {"a": 0.1, "b": 0.3, "c": 0.2}, "fd": {"a": 9.0, "b": 3.0, "c": 4.0}}
    assert mean_ranks(values) == {"a": 2.0, "c": 2.0, "b": 2.0}
    assert mean_ranks({"kid": values["kid"]}) == {"a": 1.0, "c": 2.0, "b": 3.0}
