"""The generator that every score of copying must find: it emits the images that it was given, one for each latent, and nothing
else. A family like the others, so that it can stand as a row in a leaderboard."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from data_shards.errors import UserError
from training.config import Config
from training.families.family import Family
from training.models.layers import Shape

if TYPE_CHECKING:
    from training.recipe import TrainingConfig


class CopierConfig(Config):
    images: int = Field(10, ge=1, description="images that are kept, and emitted with equal chances; the method copier keeps "
                                              "the support set")


class Copier(nn.Module):
    """z (N, latent_dim) -> one of the kept images each, (N, *shape) in [-1, 1], by the first normal's distribution function."""

    kept: Tensor

    def __init__(self, shape: Shape, images: int) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(images, *shape))

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        share = torch.special.ndtr(z[:, 0].double())
        return self.kept[(share * len(self.kept)).long().clamp(max=len(self.kept) - 1)]


@torch.no_grad()
def keep(network: nn.Module, config: TrainingConfig, images: Tensor, seed: int) -> dict[str, float]:
    """Keep the first of ``images`` uint8 (N, C, H, W) in a `Copier`, in place; returns how many.

    Raises:
        UserError: when there are fewer than are to be kept.
    """
    assert isinstance(network, Copier)
    count = len(network.kept)
    if len(images) < count:
        raise UserError(f"the family copier is to keep {count} images (training.copier.images), and there are {len(images)}; "
                        "lower it.")
    network.kept.copy_(images[:count].to(network.kept.device).float() / 127.5 - 1)
    return {"generator/kept": float(count)}


COPIER = Family(
    names=("generator",),
    networks=lambda config, shape: {"generator": Copier(shape, config.copier.images)},
    phases=lambda config, augmentation: [],
    models={},
    shown={"kept": "generator/kept"},
    fit=keep)
