"""Recipes: overrides, errors that name the remedy, and which fields decide a result."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from data_shards import UserError
from tests.toy import toy_tree
from training.config import apply_overrides, field_paths, parse_overrides
from training.recipe import RECIPES_FOLDER, TrainingRecipe, per_worker_batch, read_recipe, resolve
from training.schedule import check_schedule, value_at


def write(folder: Path, tree: object) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def test_an_override_reaches_the_recipe_as_a_number(tmp_path: Path) -> None:
    recipe = read_recipe(TrainingRecipe, write(tmp_path, toy_tree(tmp_path)),
                         parse_overrides(["training.generator.lr=1e-4", "adaptation.lr=[[0, 1e-3], [100, 1e-4]]"]))
    assert recipe.training.generator.lr == 1e-4
    assert recipe.adaptation.lr == [(0, 1e-3), (100, 1e-4)]
    assert recipe.name == "toy"


@pytest.mark.parametrize(("key", "right"), [
    ("training.generator.lrr", "training.generator.lr"), ("training.bacth", "training.batch"), ("metta.steps", "meta"),
    ("adaptation.frozen_block", "adaptation.frozen_blocks")])
def test_a_wrong_key_names_the_nearest_right_one(tmp_path: Path, key: str, right: str) -> None:
    with pytest.raises(UserError, match=f"did you mean '{right}'"):
        read_recipe(TrainingRecipe, write(tmp_path, toy_tree(tmp_path)), {key: 1})


@pytest.mark.parametrize(("overrides", "sentence"), [
    ({"training.objective.loss": "wasserstain"}, "no such objective; known: relativistic"),
    ({"training.generator.model": "x"}, "no such model; known: dcgan"),
    ({"training.discriminator.minibatch_std": 3}, "training.batch = 8 does not fall into groups of 3 images"),
    ({"training.generator.r3gan.block": 2}, "did you mean 'training.generator.r3gan.blocks'"),
    ({"training.batch": 0}, "training.batch = 0 is refused"), ({"adaptation.lr": "abc"}, "adaptation.lr = 'abc' is refused"),
    ({"training.generator.lr": -1.0}, "not negative"),
    ({"adaptation.batch": 64}, "adaptation.images = 32 is less than one batch")])
def test_a_wrong_value_is_one_sentence(tmp_path: Path, overrides: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as raised:
        resolve(TrainingRecipe, apply_overrides(toy_tree(tmp_path), overrides), where="mine.yaml")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("engine", "more", "sentence"), [
    ({"kind": "torch", "offload_optimizer": True}, {}, "the plain engine offloads nothing; use kind deepspeed"),
    ({"zero": 0, "offload_optimizer": True}, {}, "ZeRO 0 has no share of the optimizer's state to offload"),
    ({"zero": 2, "offload_parameters": True}, {}, "only ZeRO 3 has shares of the weights"),
    ({"zero": {"critic": 3}}, {}, "engine.zero names 'critic', but the networks are generator and discriminator"),
    ({"compile": ["discriminator"]}, {}, "a compiled network has no double backward"),
    ({"compile": ["generator"], "zero": 3}, {}, "engine.compile cannot have the generator at ZeRO 3"),
    ({"zero": 3, "checkpoint_activations": True}, {}, "does not go with penalties at ZeRO 3"),
    ({"zero": 1, "kind": "deepspeed"}, {"precision": "bf16_weights"}, "needs engine.kind auto or deepspeed and zero 2 or 3"),
    ({"zero": 3, "kind": "deepspeed"}, {"precision": "bf16_weights"}, "finite differences need fp32 weights"),
    ({"kind": "deepspeed"}, {"precision": "fp16"}, "precision fp16 needs engine.kind auto or torch"),
    ({"accumulation": 3}, {}, "does not fall into 3 equal parts")])
def test_engines_that_cannot_work_are_refused_with_the_reason(tmp_path: Path, engine: dict[str, object],
                                                              more: dict[str, object], sentence: str) -> None:
    tree = toy_tree(tmp_path, engine=engine, **more)
    with pytest.raises(UserError, match=sentence) as raised:
        recipe = resolve(TrainingRecipe, tree, where="mine.yaml")
        per_worker_batch(recipe.training.batch, 1, recipe.data.streams, recipe.training.engine.accumulation)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("data", "sentence"), [
    ({"source": "pipe:touch canary"}, "not an address that is read"), ({"root": "ftp://host/x"}, "not an address that is read"),
    ({"mix": {"other": -1.0}}, "weight -1.0 of other"), ({"mix": {"other": float("nan")}}, "weight nan of other"),
    ({"mix": {"hf://other": 1.0}}, "not an address that is read"), ({"class_weights": {"cat": 0.0}}, "weight 0.0 of cat")])
def test_sets_and_weights_that_cannot_be_are_refused_when_the_recipe_is_read(tmp_path: Path, data: dict[str, object],
                                                                            sentence: str) -> None:
    tree = toy_tree(tmp_path)
    with pytest.raises(UserError, match=sentence):
        read_recipe(TrainingRecipe, write(tmp_path, tree | {"data": {"source": "source", "root": "data"} | data}))


def test_a_key_that_stands_twice_and_a_file_that_is_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("data: {source: a}\ntraining:\n  batch: 32\n  batch: 16\n")
    with pytest.raises(UserError, match="line 4, column 3, is not valid YAML: the key 'batch' stands twice"):
        read_recipe(TrainingRecipe, str(path))
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read_recipe(TrainingRecipe, str(path))


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="smoke"):
        read_recipe(TrainingRecipe, "no-such-recipe")


def test_a_file_with_code_in_it_runs_none(tmp_path: Path) -> None:
    (tmp_path / "evil.yaml").write_text(f"name: !!python/object/apply:pathlib.Path.touch ['{tmp_path}/canary']\n")
    with pytest.raises(UserError, match="not valid YAML"):
        read_recipe(TrainingRecipe, str(tmp_path / "evil.yaml"))
    assert not (tmp_path / "canary").exists()


def test_every_field_has_a_description() -> None:
    from cluster.recipe import Recipe
    from training.config import Config

    def check(model: type[Config]) -> None:
        for name, field in model.model_fields.items():
            nested = field.annotation
            if isinstance(nested, type) and issubclass(nested, Config):
                check(nested)
            else:
                assert field.description, f"{model.__name__}.{name}"

    check(Recipe)
    assert "training.generator.lr" in list(field_paths(Recipe))


@pytest.mark.parametrize("path", sorted(RECIPES_FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_project_reads(path: Path) -> None:
    from cluster.recipe import Recipe

    assert read_recipe(Recipe, str(path)).name == path.stem
    assert read_recipe(TrainingRecipe, path.stem).name == path.stem


def test_batches_that_do_not_divide_name_the_nearest_that_do() -> None:
    assert per_worker_batch(64, 2, 24) == 32
    with pytest.raises(UserError, match="use 63 or 66"):
        per_worker_batch(64, 3, 24)
    with pytest.raises(UserError, match=r"use one of 1, 2, 3, 4, 6, 8, 12, 24"):
        per_worker_batch(65, 5, 24)


def test_schedules_are_piecewise_linear() -> None:
    knots = [(10.0, 1.0), (20.0, 3.0)]
    assert [value_at(knots, images) for images in (0, 10, 15, 20, 99)] == [1, 1, 2, 3, 3]
    assert value_at(0.5, 1e9) == 0.5
    with pytest.raises(ValueError, match="increase"):
        check_schedule([(10, 1.0), (10, 2.0)])
