"""The source's discriminator as the frozen trunk of the target's: fresh heads judge its features at every scale, and G is
fine-tuned against them (projected GANs, Sauer et al. 2021, section 3, with features of the source for those of a classifier).

Differences from the paper, each for a reason: no random projections across channels and scales, which keep heads from looking
at the most telling of a classifier's features only, where these are a discriminator's own; the heads' logits are averaged,
where the paper adds their losses, so that every objective and penalty of the recipe applies. The in-domain encoder is not
offered as a trunk: the scores are taken in its features, and a discriminator on them would train G for the score.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from training.config import Config
from training.draws import generator as draw
from training.methods.method import Adaptation, Method, discriminator_of
from training.models.layers import Head, he_normal, leaky
from training.world import device


class ProjectedConfig(Config):
    channels: int = Field(32, ge=1, description="channels of each head on the frozen trunk")


class TapHead(nn.Module):
    """Features at one scale, (N, C, h, w) or (N, F) -> logits (N,): a layer, leaky ReLU, the mean over places, a `Head`."""

    def __init__(self, tap: Tensor, channels: int, classes: int) -> None:
        super().__init__()
        layer = nn.Conv2d(tap.shape[1], channels, 3, padding=1) if tap.dim() == 4 else nn.Linear(tap.shape[1], channels)
        he_normal(layer)
        self.layer, self.head = layer, Head(channels, classes)
        he_normal(self.head, gain=1.0)

    def forward(self, tap: Tensor, labels: Tensor | None) -> Tensor:
        return self.head(leaky(self.layer(leaky(tap))).flatten(2).mean(2) if tap.dim() == 4 else leaky(self.layer(tap)), labels)


class ProjectedDiscriminator(nn.Module):
    """images (N, C, H, W) -> logits (N,), through a ``trunk`` that never changes.

    Args:
        trunk: a discriminator of `training.models`.
        shown: images such as the trunk takes, to read its widths off.
    """

    def __init__(self, trunk: nn.Module, shown: Tensor, channels: int) -> None:
        super().__init__()
        self.trunk = trunk.requires_grad_(False).eval()
        self.classes = int(trunk.classes)  # type: ignore[arg-type]  # Module.__getattr__ is untyped
        with torch.no_grad():
            self.heads = nn.ModuleList(TapHead(tap, channels, self.classes) for tap in self.taps(shown))

    def taps(self, images: Tensor) -> list[Tensor]:
        """What each block but the last puts out, and what the trunk's own head would see."""
        *blocks, _ = self.trunk.blocks  # type: ignore[misc]
        found: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            found.append(output)

        handles = [block.register_forward_hook(keep) for block in blocks]
        try:
            features: Tensor = self.trunk.features(images)  # type: ignore[operator]
        finally:
            for handle in handles:
                handle.remove()
        return [*found, features]

    def features(self, images: Tensor) -> Tensor:
        """What the trunk's own head would see, (N, F)."""
        return self.taps(images)[-1]

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = [head(tap, labels) for head, tap in zip(self.heads, self.taps(images), strict=True)]
        return torch.stack(logits).mean(0)


def put_on_trunk(networks: dict[str, nn.Module], adaptation: Adaptation) -> None:
    """Fresh heads on the discriminator, which stays as it is.

    Raises:
        UserError: for a family without a discriminator.
    """
    trunk = discriminator_of(networks, adaptation, "the method projected puts new heads on")
    training = adaptation.recipe.training
    _, channels, *size = adaptation.support.shape
    lot = torch.zeros(training.discriminator.minibatch_std or 1, channels * training.objective.pack, *size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(adaptation.seed, "projected heads", 0).initial_seed())
        projected = ProjectedDiscriminator(trunk, lot.to(device()), adaptation.recipe.adaptation.projected.channels)
    networks["discriminator"] = projected.to(device())


METHOD = Method(start="pretrain", prepare=put_on_trunk, hyperparameters=("lr", "r1", "projected.channels"))
