"""Small networks for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from training.models import make_gan
from training.models.config import DiscriminatorConfig, GeneratorConfig
from training.models.layers import Shape

LATENT = 6


def small_gan(model: str, shape: Shape = (1, 16, 16), *, seed: int = 0, classes: int = 0, packed: int = 1,
              generator: dict[str, Any] | None = None, **discriminator: Any) -> tuple[nn.Module, nn.Module]:
    """Generator and discriminator of 4 channels with weights of ``seed``."""
    torch.manual_seed(seed)
    common: dict[str, Any] = {"channels": 4, "growth": 2}
    networks = make_gan(GeneratorConfig(model=model, latent_dim=LATENT, classes=classes, **common, **(generator or {})),
                        DiscriminatorConfig(**common | discriminator), shape, packed)
    return networks["generator"], networks["discriminator"]


def latents(count: int, seed: int = 1, dim: int = LATENT) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def pictures(count: int, shape: Shape = (1, 16, 16), seed: int = 2) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def stir(network: nn.Module, seed: int = 9, scale: float = 0.3) -> None:
    """Move every parameter off its initialisation, class tables and zero-initialised layers too."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=draw).to(parameter))
