"""Starts to adapt from, and trials of them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.toy import toy_tree
from tests.training.models.make import stir
from training.checkpoint import checkpoint_hash, load_checkpoint, save_checkpoint
from training.config import apply_overrides, content_id
from training.families import FAMILIES, Batch
from training.methods import METHODS, Adaptation
from training.networks import make_networks
from training.recipe import TrainingRecipe
from training.trial import Trial, trial_folder, trial_id

SHAPE = (1, 16, 16)
SMALL: dict[str, dict[str, Any]] = {
    "dcgan": {}, "resnet": {"training.generator.growth": 2, "training.discriminator.growth": 2},
    "r3gan": {"training.generator.growth": 2, "training.discriminator.growth": 2, "training.generator.r3gan.group_channels": 4,
              "training.discriminator.r3gan.group_channels": 4},
    "style": {"training.generator.style.dim": 8, "training.generator.growth": 2, "training.discriminator.growth": 2},
    "mlp": {"training.generator.channels": 8, "training.discriminator.channels": 8}}
"""What makes each model small."""


def recipe_of(root: Path, settings: Mapping[str, Any] | None = None, model: str = "dcgan") -> TrainingRecipe:
    """A toy recipe, with settings by dotted key."""
    tree = apply_overrides(toy_tree(root), {"training.generator.model": model, "adaptation.ewc.samples": 8,
                                            "adaptation.converter": {"channels": 4, "blocks": 1, "halvings": 1, "history": 8},
                                            **SMALL[model], **(settings or {})})
    return TrainingRecipe.model_validate(tree)


def start_of(recipe: TrainingRecipe, seed: int = 0) -> dict[str, nn.Module]:
    """Networks off their initialisation."""
    networks = make_networks(recipe.training, SHAPE, seed)
    for network in networks.values():
        stir(network, scale=0.05)
    return networks


def adaptation_of(recipe: TrainingRecipe, networks: dict[str, nn.Module]) -> Adaptation:
    phases = FAMILIES[recipe.training.family].phases(recipe.training, recipe.adaptation.augmentation)
    support = (pictures(6) * 127.5 + 127.5).round().to(torch.uint8)
    source = {name: copy.deepcopy(network).requires_grad_(False) for name, network in networks.items()}
    return Adaptation(recipe, source, support, 1, phases)


def pictures(count: int, seed: int = 2) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def batch_of(recipe: TrainingRecipe, images: Tensor | None = None) -> Batch:
    images = pictures(4) if images is None else images
    draw = torch.Generator().manual_seed(3)
    latents = {name: torch.randn(len(images), recipe.training.generator.latent_dim, generator=draw)
               for name in ("discriminator", "generator")}
    return Batch(images, torch.full((len(images),), -1), latents, {"r1": 1.0, "r2": 1.0})


def trial_of(run: Path, recipe: TrainingRecipe, method: str, **changes: Any) -> Trial:
    """A search trial that begins from `start_of` the recipe."""
    checkpoint = run / "starts" / content_id(recipe.training.model_dump(mode="json"))
    if not checkpoint.exists():
        networks = {("generator_ema" if name == "generator" else name): network.state_dict()
                    for name, network in start_of(recipe).items()}
        save_checkpoint(checkpoint, networks, {"images": 0, "recipe": recipe.model_dump(mode="json")})
    fresh = METHODS[method].start == "scratch"
    trial = Trial("bars", str(run.parent / "target"), method, 1, "search", METHODS[method].start,
                  None if fresh else str(checkpoint), None if fresh else checkpoint_hash(checkpoint))
    return dataclasses.replace(trial, **changes)


def weights_of(run: Path, trial: Trial, recipe: TrainingRecipe) -> dict[str, dict[str, Tensor]]:
    return load_checkpoint(trial_folder(run, trial, trial_id(trial, recipe)) / "best")[0]

