"""A checkpoint and a folder scored against a set: which scores are taken, which are left out and why, and what they say."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_shards import ShardSet, load_images, open_set
from data_shards.errors import UserError
from tests.toy import SIZE, stroke_set, toy_recipe, toy_set
from training.evaluation import evaluate, of_checkpoint, of_images
from training.metrics.catalogue import SCORES
from training.metrics.encoder import save_encoder, train_encoder
from training.metrics.features import FeatureNet, load_feature_net
from training.pretrain import pretrain
from training.world import World


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets "source" (labelled, with a reference split) and "strokes", an encoder of the source, a pretrained run."""
    root = tmp_path_factory.mktemp("evaluation")
    source = toy_set(root / "source", train=160, reference=80)
    toy_set(root / "whole", train=96, reference=0)
    stroke_set(root / "strokes", train=60, reference=60)
    images, labels = load_images(source, source.indices())
    save_encoder(train_encoder(images, labels, classes=2, seed=0, images_budget=2048, threads=1), root / "encoder.safetensors")
    pretrain(toy_recipe(root), source, root / "run", World())
    return root


@pytest.fixture
def net(root: Path) -> FeatureNet:
    return load_feature_net("encoder", root / "encoder.safetensors")


@pytest.fixture
def source(root: Path) -> ShardSet:
    return open_set(root / "source")


def write_images(folder: Path, images: torch.Tensor, labels: list[str] | None = None) -> Path:
    for i, image in enumerate(images):
        place = folder / labels[i] if labels else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(place / f"{i:04d}.png")
    return folder


def test_a_checkpoint_gets_every_score_it_can_have(root: Path, net: FeatureNet, source: ShardSet, tmp_path: Path) -> None:
    fakes = of_checkpoint(root / "run" / "pretrain" / "step-000000000064", 64, 0)
    assert torch.equal(fakes.images, of_checkpoint(root / "run" / "pretrain" / "step-000000000064", 64, 0).images)
    steps: list[tuple[float, str]] = []
    found = evaluate(fakes, source, net, gallery=tmp_path / "nearest.png", progress=lambda *step: steps.append(step))
    assert json.loads(json.dumps(found)) == found
    # 64 fakes around 160 training images need not share a cluster; a GAN without classes has no labels.
    assert set(found["skipped"]) == {"intra_distance", "classification"}
    assert {"kid", "fd", "fd_infinity", "precision", "mind", "inception_score", "adversarial_accuracy", "copy_rate", "c_t",
            "path_length", "modes", "ndb_share", "collapsed"} <= set(found["scores"])
    assert found["scores"]["adversarial_accuracy"] > 0.9, "eight steps of training fool no one"
    contract = found["contract"]
    assert (contract["n_fake"], contract["n_reference"], contract["n_training"]) == (64, 80, 160)
    assert contract["net_hash"] == net.hash and found["of"]["images_seen"] == 64
    assert [share for share, _ in steps] == sorted(share for share, _ in steps) and steps[-1][0] == 1
    width = Image.open(tmp_path / "nearest.png").width
    assert width == 8 * SIZE + 7, "eight pairs"


def test_real_held_out_images_pass_and_copies_are_flagged(root: Path, net: FeatureNet, tmp_path: Path) -> None:
    """The strokes are no two alike; half of them play the generator once fresh, once copied from the training split."""
    strokes = open_set(root / "strokes")
    training, _ = load_images(strokes, strokes.indices("train"))
    fresh = stroke_set(tmp_path / "fresh", train=200, reference=0, seed=77)
    honest = of_images(write_images(tmp_path / "honest", load_images(fresh, range(200))[0]), (1, SIZE, SIZE), None, 0)
    copied = of_images(write_images(tmp_path / "copied", training.repeat(4, 1, 1, 1)), (1, SIZE, SIZE), None, 0)
    names = ("copying", "c_t", "adversarial", "intra_distance")
    good, bad = (evaluate(fakes, strokes, net, scores=names)["scores"] for fakes in (honest, copied))
    assert good["copy_rate"] < 0.15 and not good["disqualified"] and abs(good["c_t"]) < 3
    assert bad["copy_rate"] == 1.0 and bad["disqualified"] and bad["auth_pct"] == 0 and bad["c_t"] < -4
    assert bad["intra_distance"] == 0 < good["intra_distance"]


def test_labelled_folders_get_classification_scores(source: ShardSet, net: FeatureNet, tmp_path: Path) -> None:
    images, labels = load_images(source, source.indices("train")[:60])
    names = [source.manifest.classes[label] for label in labels.tolist()]
    fakes = of_images(write_images(tmp_path / "labelled", images, names), (1, SIZE, SIZE), None, 0)
    found = evaluate(fakes, source, net, scores=("classification", "modes"))["scores"]
    assert found["cas_accuracy"] > 0.9 and found["gan_test_accuracy"] > 0.9
    assert found["modes"] == 2 and found["mode_kl"] < 0.01
    one = of_images(tmp_path / "labelled" / "bar", (1, SIZE, SIZE), None, 0)
    assert evaluate(one, source, net, scores=("modes",))["scores"]["modes"] == 1
    with pytest.raises(UserError, match="'classification' cannot be computed: the generated images have no classes"):
        evaluate(one, source, net, scores=("classification",))


def test_a_set_without_a_reference_split_is_its_own_yardstick(root: Path, net: FeatureNet) -> None:
    whole = open_set(root / "whole")
    fakes = of_checkpoint(root / "run" / "pretrain" / "step-000000000064", 32, 0)
    found = evaluate(fakes, whole, net)
    assert found["against"]["split"] == "train" and found["contract"]["n_reference"] == 96
    assert {"copying", "c_t", "adversarial"} <= set(found["skipped"])
    assert all("reference split" in found["skipped"][name] for name in ("copying", "adversarial"))


def test_the_frechet_distance_takes_the_whole_reference(root: Path, net: FeatureNet, source: ShardSet) -> None:
    fakes = of_checkpoint(root / "run" / "pretrain" / "step-000000000064", 32, 0)
    few, all_of_it = (evaluate(fakes, source, net, scores=("fd", "kid"), limit=limit) for limit in (40, 5000))
    assert few["scores"]["fd"] == pytest.approx(all_of_it["scores"]["fd"], rel=1e-9)
    assert few["scores"]["kid"] != all_of_it["scores"]["kid"]
    assert few["contract"]["n_reference_compared"] == 40 and few["contract"]["n_reference"] == 80


def test_images_are_read_as_packing_reads_them(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    Image.new("RGB", (40, 30), (255, 255, 255)).save(folder / "wide.jpg")
    Image.new("L", (SIZE, SIZE), 7).save(folder / "small.png")
    found = of_images(folder, (1, SIZE, SIZE), None, 0)
    assert found.images.shape == (2, 1, SIZE, SIZE) and found.images[:, 0, 3, 3].tolist() == [7, 255]
    np.savez(tmp_path / "made.npz", images=np.full((30, SIZE, SIZE), 9, np.uint8))
    some = of_images(tmp_path / "made.npz", (1, SIZE, SIZE), 12, 0)
    assert some.images.shape == (12, 1, SIZE, SIZE) and bool((some.images == 9).all())
    (folder / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"broken\.png"):
        of_images(folder, (1, SIZE, SIZE), None, 0)


def test_mistakes_are_one_sentence(root: Path, net: FeatureNet, source: ShardSet, tmp_path: Path) -> None:
    fakes = of_checkpoint(root / "run" / "pretrain" / "step-000000000064", 16, 0)
    with pytest.raises(UserError, match=f"no score 'kidd'; choose among {', '.join(SCORES)}"):
        evaluate(fakes, source, net, scores=("kidd",))
    large = of_images(write_images(tmp_path / "large", fakes.images), (1, 20, 20), None, 0)
    with pytest.raises(UserError, match=r"\(1, 20, 20\)"):
        evaluate(large, source, net)
    with pytest.raises(UserError, match="not a usable checkpoint"):
        of_checkpoint(root, 16, 0)
