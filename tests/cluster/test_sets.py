"""What a run finds out about its sets before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.recipe import Recipe
from cluster.run import run, train_run_encoder
from cluster.sets import check_sets, encoder_set, missing_sets, named_sets, ready_sets
from data_shards import Sample, UserError, open_set, pack_images
from tests.toy import SIZE, toy_set, toy_tree
from training.config import apply_overrides
from training.metrics.encoder import load_encoder
from training.recipe import resolve


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A source without labels, a target, and two labelled sets, one of another size."""
    rng = np.random.default_rng(0)

    def samples(size: int, labels: list[int]) -> list[Sample]:
        return [Sample(f"{i}", rng.integers(0, 255, (1, size, size), np.uint8), label) for i, label in enumerate(labels)]

    pack_images(samples(SIZE, [-1] * 32), tmp_path / "source", name="source", shape=(1, SIZE, SIZE), classes=[])
    pack_images(samples(8, [0, 1] * 16), tmp_path / "small", name="small", shape=(1, 8, 8), classes=["a", "b"])
    toy_set(tmp_path / "labelled")
    toy_set(tmp_path / "target", train=24, reference=24, seed=5)
    return tmp_path


def recipe_of(root: Path, **settings: Any) -> Recipe:
    tree = toy_tree(root) | {"cluster": {"workers": 1}, "fanout": {"targets": [{"set": "target"}]}}
    return Recipe.model_validate(apply_overrides(tree, settings))


def test_an_encoder_may_learn_from_another_set_than_the_source(root: Path) -> None:
    recipe = recipe_of(root, **{"evaluation.encoder_source": "labelled"})
    source = ready_sets(recipe)
    taught = encoder_set(recipe, source)
    assert taught is not None and taught.manifest.name == "labelled" and source.manifest.name == "source"
    assert named_sets(recipe) == ["source", "labelled", "target"]
    train_run_encoder(recipe, source, root / "run")
    assert load_encoder(root / "run" / "encoder.safetensors").config["classes"] == 2


@pytest.mark.parametrize(("settings", "said"), [
    ({}, r"source has images without a label, .* name a labelled set .* in evaluation\.encoder_source"),
    ({"evaluation.encoder_source": "small"}, r"images of shape \(1, 8, 8\) and the source \(1, 16, 16\); name a set")])
def test_a_set_that_no_encoder_can_learn_from_is_refused_before_anything_is_trained(root: Path, settings: dict[str, Any],
                                                                                    said: str) -> None:
    with pytest.raises(UserError, match=said):
        ready_sets(recipe_of(root, **settings))


def test_without_the_encoder_no_labels_are_asked_for(root: Path) -> None:
    recipe = recipe_of(root, **{"evaluation.net": "inception"})
    assert encoder_set(recipe, open_set(root / "source")) is None
    assert ready_sets(recipe).manifest.name == "source"
    assert encoder_set(recipe_of(root, **{"evaluation.encoder_source": "labelled"}), open_set(root / "source")) is not None


def test_a_missing_set_of_the_encoder_is_fetched_with_the_others(root: Path) -> None:
    recipe = recipe_of(root, **{"evaluation.encoder_source": "mnist/source"})
    assert missing_sets(recipe) == {"mnist": {"mnist/source"}}


REPTILE = {"fanout.methods": ["scratch", "reptile"], "evaluation.encoder_source": "labelled"}


@pytest.mark.parametrize(("settings", "said"), [
    ({"data.source": "labelled", "adaptation.shots": 40}, "adaptation.shots = 40"),
    ({"data.source": "labelled", "fanout.targets": [{"set": "small"}]}, "small has 0 reference images"),
    ({"data.source": "labelled", "fanout.targets": [{"set": "tiny"}]}, r"shape \(1, 8, 8\) and the source \(1, 16, 16\)"),
    ({}, "images without a label"),
    ({"data.source": "labelled", "training.generator.classes": 3}, "classes = 3, and the source .* has 2 classes"),
    (REPTILE, "has 0 classes, and meta-training takes its tasks from them"),
    (REPTILE | {"data.source": "labelled", "meta.shots": 900}, r"meta\.shots = 900 and 0 queries need 900 images of every"),
    ({"data.source": "labelled", "fanout.methods": ["lora"], "fanout.settings": {"lora": {"lora.rank": 4}}}, ""),
    ({"data.source": "labelled", "fanout.methods": ["freezed"], "fanout.settings": {"freezed": {"frozen_blocks": 99}}},
     "frozen_blocks = 99")])
def test_a_dry_run_refuses_what_the_run_would(root: Path, settings: dict[str, Any], said: str) -> None:
    images = np.random.default_rng(1).integers(0, 255, (48, 1, 8, 8), np.uint8)
    pack_images([Sample(f"{i}", image, -1, "train" if i < 24 else "reference") for i, image in enumerate(images)],
                root / "tiny", name="tiny", shape=(1, 8, 8), classes=[])
    recipe = recipe_of(root, **settings)
    if not said:
        run(recipe, root / "run", dry_run=True)
    else:
        with pytest.raises(UserError, match=said):
            run(recipe, root / "run", dry_run=True)
    assert not (root / "run").exists()


def test_sets_that_are_not_there_yet_are_left_to_the_run(root: Path) -> None:
    recipe = recipe_of(root, **{"data.source": "mnist/source", "fanout.targets": [{"set": "target"}, {"set": "mnist/3"}]})
    assert check_sets(recipe, {"mnist/source", "mnist/3"}) is None
    with pytest.raises(UserError, match=r"adaptation\.shots = 40"):
        check_sets(recipe.model_copy(update={"adaptation": recipe.adaptation.model_copy(update={"shots": 40})}),
                   {"mnist/source", "mnist/3"})


@pytest.mark.parametrize(("settings", "said"), [
    ({"fanout.settings": {"lora": {"lora.rank": 0}}}, r"fanout\.settings\.lora: lora\.rank = 0 is refused"),
    ({"fanout.settings": {"scratch": {"lr": -3}}}, r"fanout\.settings\.scratch: lr = -3 is refused"),
    ({"fanout.space": {"cdc.weight": [1.0, "abc"]}}, r"fanout\.space: cdc\.weight = 'abc' is refused"),
    ({"fanout.space": {"lr": {"uniform": [-1.0, 0.1]}}}, r"fanout\.space: lr = -1\.0 is refused"),
    ({"fanout.targets": "nope"}, "a list is needed")])
def test_values_of_settings_and_space_are_those_that_the_fields_take(root: Path, settings: dict[str, Any], said: str) -> None:
    tree = apply_overrides(toy_tree(root) | {"cluster": {"workers": 1}, "fanout": {"targets": [{"set": "target"}]}}, settings)
    with pytest.raises(UserError, match=said):
        resolve(Recipe, tree, where="mine.yaml")
