"""MineGAN's miner (Wang et al. 2020, section 3.1): a small network in front of a generator, z -> z', that finds the latents
which a target is made of."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from training.models.layers import he_normal, leaky


class Miner(nn.Module):
    """z (N, D) -> z + f(z) (N, D), f of ``layers`` linear layers with leaky ReLU between them.

    The last one starts at 0, so that the miner starts as the identity and the generator as what it was; the paper's miner is f
    alone, from a random start.
    """

    def __init__(self, latent_dim: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(latent_dim, latent_dim) for _ in range(layers))
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            he_normal(layer)
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]  # Module.__getattr__ is untyped

    def forward(self, z: Tensor) -> Tensor:
        x = z
        for i, layer in enumerate(self.layers):
            x = layer(leaky(x) if i else x)
        return z + x


def with_miner(generator: nn.Module, layers: int) -> nn.Module:
    """``generator`` with a `Miner` before it, whose weights are the generator's ``miner``; without one for 0 layers."""
    if layers:
        latent_dim = generator.latent_dim
        assert isinstance(latent_dim, int)
        generator.miner = Miner(latent_dim, layers)
        generator.register_forward_pre_hook(_mine)
    return generator


def _mine(generator: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    miner = generator.miner
    assert isinstance(miner, Miner)
    return (miner(inputs[0]), *inputs[1:])
