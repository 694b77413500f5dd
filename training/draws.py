"""Random draws as pure functions of (seed, purpose, images seen) for the global batch: no hidden generator state, so a resumed
run and a run of another world size draw the same numbers, and no two ranks draw alike."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from training.world import World


def generator(seed: int, purpose: str, images: int) -> torch.Generator:
    """A CPU generator for one draw; CPU numbers are the same on every device."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{images}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def latents(seed: int, purpose: str, images: int, batch: int, latent_dim: int, world: World | None = None) -> Tensor:
    """This rank's latents z ~ N(0, I), (batch / world.size, latent_dim), of the global draw."""
    z = torch.randn(batch, latent_dim, generator=generator(seed, purpose, images))
    return world.slice(z) if world else z


def uniforms(seed: int, purpose: str, images: int, batch: int, count: int, world: World | None = None) -> Tensor:
    """This rank's ``count`` numbers of U[0, 1) for each image, float64 (batch / world.size, count), of the global draw."""
    u = torch.rand(batch, count, dtype=torch.float64, generator=generator(seed, purpose, images))
    return world.slice(u) if world else u
