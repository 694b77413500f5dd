"""Trials from sources that were told other classes than the target's, or none, or some where the target has none."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.recipe import Recipe
from cluster.sets import ready_sets
from data_shards import Sample, UserError, open_set, pack_images
from tests.toy import SIZE, toy_recipe, toy_set, toy_tree
from training.checkpoint import checkpoint_hash, load_checkpoint
from training.draws import latents
from training.evaluation import of_checkpoint
from training.meta.metatrain import metatrain
from training.metrics.encoder import save_encoder, train_encoder
from training.networks import load_start, make_networks
from training.pictures import to_uint8
from training.pretrain import pretrain
from training.recipe import TrainingRecipe
from training.sample import averaged_generator
from training.target import for_target
from training.trial import Trial, rescore, run_trial, trial_folder, trial_id
from training.world import World

TARGET_CLASSES = ["cross", "square", "bar"]  # the source has bar and cross


def target_set(folder: Path, classes: list[str]) -> None:
    rng = np.random.default_rng(7)
    images = [Sample(f"{i}", rng.integers(0, 255, (1, SIZE, SIZE), np.uint8), i % len(classes) if classes else -1,
                     "train" if i < 24 else "reference") for i in range(48)]
    pack_images(images, folder, name=folder.name, shape=(1, SIZE, SIZE), classes=classes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conditional source pretrained in ``told/``, an unconditional one in ``untold/``, and two target sets."""
    root = tmp_path_factory.mktemp("root")
    source = toy_set(root / "source")
    target_set(root / "target", TARGET_CLASSES)
    target_set(root / "unlabelled", [])
    encoder = train_encoder(torch.randint(0, 255, (64, 1, SIZE, SIZE), dtype=torch.uint8), torch.arange(64) % 2, classes=2,
                            seed=0, images_budget=128, threads=1)
    for name, classes in (("told", 2), ("untold", 0)):
        pretrain(recipe_of(root, classes), source, root / name, World())
        save_encoder(encoder, root / name / "encoder.safetensors")
    return root


def recipe_of(root: Path, classes: int, **adaptation: Any) -> TrainingRecipe:
    recipe = toy_recipe(root, images=32, generator={"channels": 4, "latent_dim": 4, "classes": classes, "lr": 0.05},
                        discriminator={"channels": 4, "lr": 0.05})
    return recipe.model_copy(update={"adaptation": recipe.adaptation.model_copy(update=adaptation)})


def checkpoint_of(root: Path, run: str) -> Path:
    return root / run / "pretrain" / "step-000000000032"


def trial_of(root: Path, run: str, target: str = "target", **changes: Any) -> Trial:
    start = checkpoint_of(root, run)
    return dataclasses.replace(Trial("noise", str(root / target), "finetune", 1, "final", "pretrain", str(start),
                                     checkpoint_hash(start)), **changes)


@pytest.mark.parametrize(("run", "classes", "conditional", "method"), [
    ("told", 2, False, "finetune"), ("told", 2, False, "freezed"), ("told", 2, True, "finetune"),
    ("untold", 0, True, "finetune"), ("told", 2, True, "scratch")])
def test_a_trial_has_the_targets_classes_or_none(root: Path, run: str, classes: int, conditional: bool, method: str) -> None:
    recipe = recipe_of(root, classes, conditional=conditional)
    trial = trial_of(root, run, method=method)
    if method == "scratch":
        trial = dataclasses.replace(trial, start="scratch", checkpoint=None, checkpoint_sha256=None)
    row = run_trial(trial, recipe, root / run, until=32)
    assert (row["status"], row["images_seen"]) == ("finished", 32) and row["kid"] is not None
    folder = trial_folder(root / run, trial, trial_id(trial, recipe))
    network, own, state = averaged_generator(folder / "best")
    assert own.training.generator.classes == network.classes == (3 if conditional else 0)
    assert state["classes"] == (TARGET_CLASSES if conditional else [])
    assert rescore(row, recipe, root / run, set_path=str(root / "target"), net="encoder")["kid"] == row["kid"]
    if method == "scratch":
        assert not (folder / "start.json").exists()
        return
    said = json.loads((folder / "start.json").read_text())
    assert said["checkpoint_sha256"] == trial.checkpoint_sha256
    for name in ("generator", "discriminator"):
        done = said["networks"][name]
        tensors = load_checkpoint(checkpoint_of(root, run), (name,))[0][name]
        tables = {key for key in tensors if "class_embedding" in key}
        assert set(done["loaded"]) == tensors.keys() - tables
        if run == "told" and conditional:
            assert (set(done["by_class"]), done["kept_classes"], done["new_classes"]) == (tables, ["cross", "bar"], ["square"])
        elif run == "told":
            assert (set(done["skipped"]), done["fresh"], bool(tables)) == (tables, [], True)
        else:
            assert done["fresh"] and all("class_embedding" in key for key in done["fresh"])


def test_the_rows_of_classes_go_by_their_names(root: Path) -> None:
    """A class of the source's name makes what it made; a new one has the mean of the rows."""
    recipe = for_target(recipe_of(root, 2, conditional=True), open_set(root / "target"))
    networks = make_networks(recipe.training, (1, SIZE, SIZE), 1)
    load_start(networks, checkpoint_of(root, "told"), TARGET_CLASSES)
    source, _, state = averaged_generator(checkpoint_of(root, "told"))
    assert state["classes"] == ["bar", "cross"]
    z = latents(0, "test", 0, 4, 4)
    for name in ("bar", "cross"):
        ours, theirs = (torch.full((4,), names.index(name)) for names in (TARGET_CLASSES, state["classes"]))
        assert torch.equal(networks["generator"](z, ours), source(z, theirs))
    tables = {name: value for name, value in networks["generator"].state_dict().items() if "class_embedding" in name}
    for name, rows in tables.items():
        there = source.state_dict()[name]
        assert not torch.equal(there[0], there[1]), "the source has learned its classes"
        torch.testing.assert_close(rows[1], there.mean(0))


def test_a_conditional_checkpoint_is_scored_with_the_classes_it_was_told(root: Path) -> None:
    fakes = of_checkpoint(checkpoint_of(root, "told"), 9, 0)
    assert fakes.labels == ("bar", "cross", "bar", "cross", "bar", "cross", "bar", "cross", "bar")
    assert fakes.generate is not None
    z = latents(0, "evaluation", 0, 9, 4)
    assert torch.equal(to_uint8(fakes.generate(z)), fakes.images)
    assert of_checkpoint(checkpoint_of(root, "untold"), 9, 0).labels is None


def test_a_source_without_names_of_classes_goes_to_a_target_without_classes_only(root: Path, tmp_path: Path) -> None:
    """Checkpoints of an earlier graft do not hold them."""
    old = tmp_path / "old"
    old.mkdir()
    for path in checkpoint_of(root, "told").iterdir():
        (old / path.name).write_bytes(path.read_bytes())
    state = json.loads((old / "state.json").read_text())
    del state["classes"]
    (old / "state.json").write_text(json.dumps(state))
    recipe = recipe_of(root, 2)
    plain = for_target(recipe, open_set(root / "target"))
    load_start(make_networks(plain.training, (1, SIZE, SIZE), 1), old)
    told = for_target(recipe_of(root, 2, conditional=True), open_set(root / "target"))
    with pytest.raises(UserError, match="2 rows there, and the classes named for them are none"):
        load_start(make_networks(told.training, (1, SIZE, SIZE), 1), old, TARGET_CLASSES)


def test_meta_learned_weights_of_a_conditional_source_start_a_trial(root: Path) -> None:
    recipe = recipe_of(root, 2)
    start = checkpoint_of(root, "told")
    meta = metatrain(recipe, open_set(root / "source"), root / "told", start, checkpoint_hash(start))
    trial = trial_of(root, "told", method="reptile", start="meta:1", checkpoint=str(meta),
                     checkpoint_sha256=checkpoint_hash(meta))
    assert run_trial(trial, recipe, root / "told", until=32)["status"] == "finished"
    told = recipe_of(root, 2, conditional=True)
    assert run_trial(trial, told, root / "told", until=32)["status"] == "finished"


def test_what_cannot_be_told_is_refused_by_name(root: Path) -> None:
    told = recipe_of(root, 2, conditional=True)
    with pytest.raises(UserError, match=r"the target set .*unlabelled has images without one; pack it with one subfolder"):
        run_trial(trial_of(root, "told", "unlabelled"), told, root / "told", until=32)
    tree = toy_tree(root, objective={"pack": 2})
    tree["adaptation"] = {"conditional": True}
    with pytest.raises(ValueError, match=r"adaptation.conditional and training.objective.pack = 2 exclude each other"):
        TrainingRecipe.model_validate(tree)
    tree = toy_tree(root, generator={"classes": 2}) | {"fanout": {"targets": [{"set": "target"}]}, "cluster": {"workers": 1}}
    assert Recipe.model_validate(tree).fanout.targets


def test_a_run_refuses_such_a_target_before_it_trains(root: Path) -> None:
    tree = toy_tree(root, generator={"classes": 2}) | {"cluster": {"workers": 1}}
    tree["fanout"] = {"targets": [{"set": "target"}, {"set": "unlabelled"}]}
    assert ready_sets(Recipe.model_validate(tree)).manifest.name == "source"
    tree["adaptation"] = {"shots": 5, "conditional": True}
    with pytest.raises(UserError, match=r"the target set .*unlabelled has images without one"):
        ready_sets(Recipe.model_validate(tree))
