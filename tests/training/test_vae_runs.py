"""Runs of the families of autoencoders: pretraining, resuming, sampling, health, trials, and what recipes refuse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_shards import ShardSet, UserError, load_images
from tests.toy import toy_recipe, toy_set, toy_tree
from training.checkpoint import checkpoint_hash, load_checkpoint
from training.config import apply_overrides
from training.cost import blank_batch, step_flops
from training.events import read_events
from training.families import FAMILIES
from training.meta.metatrain import metatrain
from training.metrics.encoder import save_encoder, train_encoder
from training.models.autoencoder import Autoencoder
from training.networks import make_networks
from training.pictures import generate
from training.pretrain import make_plan, pretrain
from training.recipe import TrainingRecipe, resolve
from training.sample import averaged_generator, sample_grid
from training.trial import Trial, _plan, run_trial
from training.world import World

FAMILY_NAMES = ("vae", "autoencoder", "vaegan")
VAE = {"reconstruction": "bernoulli", "kl_weight": [[0, 0.0], [48, 1.0]], "free_bits": 0.05}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    root = tmp_path_factory.mktemp("root")
    toy_set(root / "target", train=24, reference=24, seed=5)
    return toy_set(root / "source")


Recipes = Callable[..., TrainingRecipe]


@pytest.fixture(scope="module")
def recipe(source: ShardSet) -> Recipes:
    assert isinstance(source.path, Path)
    root = source.path.parent
    return lambda family, **training: toy_recipe(root, **{"family": family, "vae": VAE, **training})


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_run_in_two_parts_is_the_run_in_one(recipe: Recipes, source: ShardSet, tmp_path: Path, family: str) -> None:
    whole = pretrain(recipe(family), source, tmp_path / "whole", World())
    pretrain(recipe(family, images=32), source, tmp_path / "parts", World())
    parts = pretrain(recipe(family), source, tmp_path / "parts", World())
    ours, theirs = load_checkpoint(parts)[0], load_checkpoint(whole)[0]
    assert ours.keys() == theirs.keys() >= {"generator", "generator_ema", "generator_optimizer"}
    assert all(torch.equal(ours[stem][name], value) for stem, named in theirs.items() for name, value in named.items())


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_terms_reach_the_log_and_the_line_of_progress(recipe: Recipes, source: ShardSet, tmp_path: Path, family: str) -> None:
    given = recipe(family, health={"every_images": 16, "images": 16})
    pretrain(given, source, tmp_path, World())
    metrics = read_events(tmp_path / "pretrain" / "events.jsonl")[-1]["metrics"]
    assert "generator/reconstruction" in metrics
    assert "health/distance_ratio" in metrics
    assert ("health/r_v" in metrics) is (family == "vaegan")  # there is a discriminator to ask
    line = FAMILIES[family].line(metrics)
    assert all(label in line for label in FAMILIES[family].shown)
    assert metrics["cost/tflops"] > 0


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_checkpoint_is_sampled(recipe: Recipes, source: ShardSet, tmp_path: Path, family: str) -> None:
    checkpoint = pretrain(recipe(family), source, tmp_path, World())
    network, _, _ = averaged_generator(checkpoint)
    z = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert network(z).shape == (3, 1, 16, 16)
    assert float(network(z).detach().abs().max()) < 1  # a sigmoid's range: the means of the likelihood
    assert sample_grid(checkpoint, tmp_path / "grid.png", count=4).stat().st_size > 100


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("model", ["dcgan", "mlp"])
def test_conditional_ones_tell_the_classes_that_they_are_told(recipe: Recipes, source: ShardSet, tmp_path: Path, family: str,
                                                              model: str) -> None:
    given = recipe(family, images=128, generator={"model": model, "channels": 8, "latent_dim": 4, "classes": 2, "lr": 0.01})
    network, _, _ = averaged_generator(pretrain(given, source, tmp_path, World()))
    z = torch.randn(1, 4, generator=torch.Generator().manual_seed(0)).expand(2, -1)
    first, second = generate(network, z, torch.tensor([0, 1])).int()
    assert (first - second).abs().max() > 2
    with pytest.raises(UserError, match="told one of 2 classes"):
        network(z)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_operations_are_counted(recipe: Recipes, source: ShardSet, family: str) -> None:
    """More codes of an image cost more decodings: the whole phase runs on the meta device."""
    counted = []
    for samples in (1, 4) if family == "vae" else (1,):
        config = recipe(family, vae={**VAE, "samples": samples}).training
        phases = FAMILIES[family].phases(config, config.augmentation)
        blank = blank_batch(phases, (1, 16, 16), 4, {"kl": 1.0, "adversarial": 1.0}, 8)
        counted.append(step_flops(phases, make_networks(config, (1, 16, 16), 0), blank))
    assert counted[0] > 0
    assert len(counted) == 1 or counted[1] > 2 * counted[0]


# Trials.


@pytest.fixture(scope="module")
def run(source: ShardSet, recipe: Recipes) -> Path:
    assert isinstance(source.path, Path)
    folder = source.path.parent / "run"
    images, labels = load_images(source, source.indices())
    save_encoder(train_encoder(images, labels, classes=2, seed=0, images_budget=512, threads=1), folder / "encoder.safetensors")
    for family in FAMILY_NAMES:
        pretrain(recipe(family), source, folder / family, World())
    return folder


def trial(run: Path, family: str, method: str) -> Trial:
    checkpoint = run / family / "pretrain" / "step-000000000064"
    scratch = method == "scratch"
    return Trial("bars", str(run.parent / "target"), method, 1, "final", "scratch" if scratch else "pretrain",
                 None if scratch else str(checkpoint), None if scratch else checkpoint_hash(checkpoint))


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("method", ["scratch", "finetune", "freezed"])
def test_trials_of_every_method_that_applies(run: Path, recipe: Recipes, family: str, method: str) -> None:
    if method == "freezed" and family != "vaegan":
        with pytest.raises(UserError, match=f"the method freezed freezes a discriminator, which the family {family} has none"):
            run_trial(trial(run, family, method), recipe(family), run, until=32)
        return
    row = run_trial(trial(run, family, method), recipe(family), run, until=32)
    assert (row["status"], row["images_seen"]) == ("finished", 32)
    assert row["kid"] is not None
    network, _, _ = averaged_generator(run / row["checkpoint"])
    assert isinstance(network, Autoencoder)


def test_meta_learned_weights_are_a_start_too(run: Path, recipe: Recipes, source: ShardSet) -> None:
    start = run / "vae" / "pretrain" / "step-000000000064"
    checkpoint = metatrain(recipe("vae"), source, run, start, checkpoint_hash(start))
    before, after = load_checkpoint(start)[0]["generator_ema"], load_checkpoint(checkpoint)[0]["generator"]
    assert any(not torch.equal(before[name], after[name]) for name in before)
    metrics = read_events(checkpoint.parent / "events.jsonl")[-1]["metrics"]
    assert metrics["generator/elbo"] == pytest.approx(-metrics["generator/reconstruction"] - metrics["generator/kl"], rel=1e-5)
    given = dataclasses.replace(trial(run, "vae", "reptile"), start="meta:x", checkpoint=str(checkpoint))
    assert run_trial(given, recipe("vae"), run, until=32)["status"] == "finished"


def test_a_trial_has_the_divergence_s_weight_after_the_warm_up(run: Path, recipe: Recipes) -> None:
    assert _plan(trial(run, "vae", "finetune"), recipe("vae"), 32).weights["kl"] == 1.0
    assert make_plan(recipe("vae")).weights["kl"] == [(0.0, 0.0), (48.0, 1.0)]


# Recipes.


@pytest.mark.parametrize(("changes", "words"), [
    ({"training.family": "vea"}, "known: gan, cyclegan, vae, autoencoder, vaegan"),
    ({"training.generator.model": "r3gan"}, r"there is no such model; known: mlp, dcgan \(generator.model, family vae\)"),
    ({"training.vae.reconstruction": "mse"}, "there is no such likelihood; known: bernoulli, gaussian, l1"),
    ({"training.vae.bound": "iwae"}, "there is no such bound; known: elbo, importance"),
    ({"training.vae.bound": "importance", "training.vae.free_bits": 0.1}, "free_bits are of divergences by dimension"),
    ({"training.vae.samples": 2, "training.family": "vaegan"}, "vae.samples are of the family vae only"),
    ({"training.vae.bound": "importance", "training.family": "autoencoder"}, "vae.bound and vae.samples are of"),
    ({"training.objective.pack": 2, "training.family": "vaegan"}, "takes D's features of single images"),
    ({"training.objective.pack": 2}, "objective.pack makes packs for a discriminator, which the family vae has none of"),
    ({"training.augmentation.kind": "ada"}, "training.augmentation.kind = ada .* which the family vae has none of"),
    ({"adaptation.augmentation.kind": "ada"}, "adaptation.augmentation.kind = ada .* which the family vae has none of"),
    ({"training.engine.zero": {"discriminator": 1}}, "engine.zero names 'discriminator', but the networks are generator")])
def test_what_cannot_work_is_refused_when_the_recipe_is_read(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    tree = toy_tree(tmp_path, family="vae")
    with pytest.raises(UserError, match=words):
        resolve(TrainingRecipe, apply_overrides(tree, changes), where="test")
