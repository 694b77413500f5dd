"""Batch spectral shrinkage (Chen et al. 2019, "Catastrophic forgetting meets negative transfer", section 4): the k smallest
squared singular values of the discriminator's feature matrix join its loss, eta sum_i sigma_{-i}^2. They belong to what
transfers worst.

The matrix has a row for each different image of the batch: a batch of 16 of 10 support images has rank 10, and the smallest
singular values of all its rows would be 0 whatever the features are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from training.config import Config
from training.families import Batch, Networks, Phase
from training.methods.method import Adaptation, Method, discriminator_of, with_term
from training.objectives.packing import pack


class BssConfig(Config):
    weight: float = Field(1e-3, ge=0, description="weight eta of the sum of the smallest squared singular values")
    values: int = Field(1, ge=1, description="number k of singular values that are shrunk")


def smallest_squares(features: Tensor, count: int) -> Tensor:
    """Sum of the ``count`` smallest squared singular values of features (N, F), all min(N, F) if there are no more."""
    return torch.linalg.svdvals(features.float())[-count:].square().sum()


def different(images: Tensor) -> Tensor:
    """The index of the first of each kind among images (N, ...), (M,)."""
    _, kind = torch.unique(images.flatten(1), dim=0, return_inverse=True)
    first = torch.full((int(kind.max()) + 1,), len(images), device=images.device)
    return first.scatter_reduce_(0, kind, torch.arange(len(images), device=images.device), "amin")


def phases(adaptation: Adaptation) -> Sequence[Phase]:
    """The family's, the discriminator's with the penalty on the real images as the batch has them, not augmented.

    It is of the batch as a whole, no mean over images; trials step whole batches.

    Raises:
        UserError: for a family without a discriminator.
    """
    discriminator_of(adaptation.source, adaptation, "the method bss shrinks the features of")
    config, packed = adaptation.recipe.adaptation.bss, adaptation.recipe.training.objective.pack

    def penalty(networks: Networks, batch: Batch) -> Tensor:
        shown = pack(batch.images, packed)
        features: Tensor = networks["discriminator"].features(shown)  # type: ignore[operator]  # Module.__getattr__ is untyped
        return smallest_squares(features[different(shown)], config.values)

    return with_term(adaptation.phases, "discriminator", "bss", config.weight, penalty)


METHOD = Method(start="pretrain", phases=phases, hyperparameters=("lr", "r1", "bss.weight"))
