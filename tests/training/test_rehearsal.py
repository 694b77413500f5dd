"""What a method cannot serve is known before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.recipe import Recipe
from cluster.run import run
from data_shards import UserError
from tests.toy import toy_recipe, toy_set, toy_tree
from training.config import apply_overrides
from training.methods import METHODS
from training.recipe import TrainingRecipe
from training.rehearsal import rehearse

SHAPE = (1, 16, 16)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "newclass"])
def test_what_a_small_gan_can_do_is_let_through(tmp_path: Path, method: str) -> None:
    rehearse(method, toy_recipe(tmp_path), SHAPE)


@pytest.mark.parametrize(("method", "settings", "said"), [
    ("newclass", {}, "training.generator.classes is 0"),
    ("freezed", {"adaptation.frozen_blocks": 9}, "adaptation.frozen_blocks = 9 does not fit"),
    ("ewc", {"training.family": "vae"}, "which the family vae has none of"),
    ("minegan", {"training.family": "vae"}, "and the family is vae"),
    ("cdc", {"adaptation.batch": 6}, "adaptation.batch = 6 is no multiple"),
    ("finetune", {"adaptation.frozen": ["generator.nothing.*"]}, "matches no weight"),
    ("fsgan", {"training.discriminator.spectral_norm": True}, "has given them another")])
def test_a_method_that_cannot_serve_the_recipe_says_so(tmp_path: Path, method: str, settings: dict[str, Any],
                                                       said: str) -> None:
    recipe = TrainingRecipe.model_validate(apply_overrides(toy_tree(tmp_path), settings))
    with pytest.raises(UserError) as error:
        rehearse(method, recipe, SHAPE)
    assert said in str(error.value)


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(("methods", "settings", "said"), [
    (["scratch", "ewc"], {"training.family": "vae"}, "which the family vae has none of"),
    (["scratch", "maml"], {"training.discriminator.spectral_norm": True, "meta.also": {"maml": {"inner_optimizer": "sgd"}}},
     "spectral")])
def test_a_run_ends_before_it_trains_and_leaves_nothing(tmp_path: Path, dry_run: bool, methods: list[str],
                                                        settings: dict[str, Any], said: str) -> None:
    toy_set(tmp_path / "source")
    toy_set(tmp_path / "target", train=24, reference=24, seed=5)
    tree = apply_overrides(toy_tree(tmp_path), settings) | {
        "cluster": {"workers": 1}, "fanout": {"targets": [{"set": "target"}], "methods": methods}}
    with pytest.raises(UserError) as error:
        run(Recipe.model_validate(tree), tmp_path / "run", dry_run=dry_run)
    assert said in str(error.value)
    assert not (tmp_path / "run").exists()
