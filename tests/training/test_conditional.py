"""Conditional pretraining, and layers over several images, in the GAN's phases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_shards import UserError
from tests.ranks import run_ranks
from tests.toy import toy_recipe, toy_set, toy_tree
from tests.training.models.make import latents, pictures, small_gan, stir
from training.families import Batch, gan_phases
from training.objectives import OBJECTIVES
from training.objectives.penalties import finite_difference_norms, squared_gradient_norms
from training.pretrain import pretrain
from training.recipe import TrainingRecipe
from training.source import open_cached
from training.world import World

LABELS = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])


def a_batch(**weights: float) -> Batch:
    return Batch(pictures(8), LABELS, {"discriminator": latents(8), "generator": latents(8, 3)}, weights)


@pytest.mark.parametrize("penalised", [(), ("r1",), ("r1", "r2")])
def test_phases_tell_classes_and_keep_real_and_generated_groups_apart(penalised: tuple[str, ...]) -> None:
    """The losses by hand with D called once on the real and once on the generated images, each with its labels."""
    g, d = small_gan("dcgan", classes=2, minibatch_std=4)
    for network in (g, d):
        stir(network, scale=0.1)
    phases = {phase.network: phase.loss for phase in gan_phases("relativistic")}
    batch = a_batch(**dict.fromkeys(penalised, 0.7))
    networks = {"generator": g, "discriminator": d}
    points = {"r1": batch.images.clone().requires_grad_(True),
              "r2": g(batch.latents["discriminator"], LABELS).detach().requires_grad_(True)}
    logits = {name: d(images, LABELS) for name, images in points.items()}
    expected = OBJECTIVES["relativistic"].discriminator(logits["r1"], logits["r2"]) + sum(
        0.35 * squared_gradient_norms(logits[name], points[name]).mean() for name in penalised)
    torch.testing.assert_close(phases["discriminator"](networks, batch)["total"], expected, rtol=1e-5, atol=1e-6)
    fake = g(batch.latents["generator"], LABELS)
    expected = OBJECTIVES["relativistic"].generator(d(batch.images, LABELS), d(fake, LABELS))
    torch.testing.assert_close(phases["generator"](networks, batch)["total"], expected)


def test_finite_differences_are_told_classes() -> None:
    _, d = small_gan("dcgan", classes=2)
    stir(d, scale=0.1)
    images = pictures(8)
    logits, norms = finite_difference_norms(d, images, LABELS)
    torch.testing.assert_close(logits, d(images, LABELS))
    images.requires_grad_(True)
    torch.testing.assert_close(norms, squared_gradient_norms(d(images, LABELS), images))


def conditional(world: World, root: str, engine: dict[str, Any]) -> dict[str, float]:
    """The largest entry of each class table after three steps."""
    recipe = toy_recipe(Path(root), images=24, generator={"channels": 4, "latent_dim": 4, "classes": 2},
                        discriminator={"channels": 4}, engine=engine)
    folder = pretrain(recipe, open_cached(f"{root}/source"), Path(root) / "run", world)
    return {f"{name}/{key}": float(value.abs().max()) for name in ("generator_ema", "discriminator")
            for key, value in load_file(folder / f"{name}.safetensors").items() if "class_embedding" in key}


@pytest.mark.parametrize("engine", [{"kind": "torch"}, {"kind": "deepspeed", "zero": 2}, {"kind": "deepspeed", "zero": 3}])
def test_conditional_networks_learn_their_classes(engine: dict[str, Any], tmp_path: Path) -> None:
    toy_set(tmp_path / "source")
    (found,) = run_ranks(conditional, 1, str(tmp_path), engine)
    assert len(found) >= 3
    assert all(value > 0 for value in found.values())


def test_classes_that_the_source_does_not_have_are_refused(tmp_path: Path) -> None:
    source = toy_set(tmp_path / "source")
    recipe = toy_recipe(tmp_path, generator={"channels": 4, "classes": 3})
    with pytest.raises(UserError, match=r"classes = 3, and the source .* has 2 classes; set it to 2"):
        pretrain(recipe, source, tmp_path / "run", World())
    mixed = recipe.model_copy(update={"data": recipe.data.model_copy(update={"mix": {"source": 1.0}})})
    with pytest.raises(UserError, match=r"leave data.mix out"):
        pretrain(mixed, source, tmp_path / "run", World())


@pytest.mark.parametrize(("training", "sentence"), [
    ({"discriminator": {"minibatch_std": 4}, "objective": {"pack": 4}}, "batch = 8 does not fall into groups of 16"),
    ({"discriminator": {"minibatch_std": 4}, "engine": {"zero": 3}}, "minibatch_std does not go with penalties at ZeRO 3"),
    ({"discriminator": {"spectral_norm": True}, "engine": {"checkpoint_activations": True}}, "change with each forward")])
def test_combinations_that_cannot_be_are_refused(tmp_path: Path, training: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        TrainingRecipe.model_validate(toy_tree(tmp_path, **training))


