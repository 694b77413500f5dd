"""Whether the methods of a fan-out can serve the recipe's networks, found out before anything is trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from training.families import FAMILIES
from training.freezing import freeze_matching
from training.methods import METHODS, Adaptation
from training.models.layers import Shape
from training.networks import make_networks
from training.recipe import TrainingRecipe
from training.trial import trial_recipe


def rehearse(method: str, recipe: TrainingRecipe, shape: Shape, hyperparameters: Mapping[str, Any] | None = None) -> None:
    """Do what a trial does up to its first step, on fresh networks for images of ``shape``, without any training.

    Raises:
        UserError: what the trial would have raised: a family, a model or a setting that the method cannot serve.
    """
    own = trial_recipe(method, recipe, hyperparameters or {})
    training = own.training.on_one_process()
    networks = make_networks(training, shape, recipe.seed)
    source = {name: copy.deepcopy(network).requires_grad_(False) for name, network in networks.items()}
    support = torch.zeros(own.adaptation.shots, *shape, dtype=torch.uint8)
    adaptation = Adaptation(own, source, support, recipe.seed,
                            FAMILIES[training.family].phases(training, own.adaptation.augmentation),
                            train=lambda state, phases, until, **changes: None, rehearsed=True)
    METHODS[method].prepare(networks, adaptation)
    if own.adaptation.frozen and METHODS[method].start != "scratch":
        freeze_matching(networks, own.adaptation.frozen, source)
    METHODS[method].phases(adaptation)
