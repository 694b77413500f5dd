"""Fully connected networks, for points (D,) as for images (C, H, W). Maxout units in D are PacGAN's setting on 2-D mixtures."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn.functional import relu

from training.models.config import DiscriminatorConfig, GeneratorConfig, MlpConfig
from training.models.layers import Film, Head, Parts, Shape, halves, he_normal, leaky, minibatch_std


class Hidden(nn.Module):
    """x (N, inputs) -> (N, units): leaky ReLU, or the maximum of ``pieces`` linear maps (Goodfellow et al. 2013, maxout)."""

    def __init__(self, inputs: int, units: int, pieces: int, classes: int = 0) -> None:
        super().__init__()
        self.pieces = pieces
        self.linear = nn.Linear(inputs, units * pieces)
        self.film = Film(classes, units * pieces)
        if pieces == 1:
            he_normal(self.linear)
        else:
            he_normal(self.linear, gain=1.0)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.film(self.linear(x), labels)
        if self.pieces == 1:
            return leaky(x)
        largest, *others = x.chunk(self.pieces, dim=1)
        for piece in others:
            largest = largest + relu(piece - largest)  # max(a, b), by the rectifier that finite-difference penalties know
        return largest


class Generator(nn.Module):
    """z (N, latent_dim) -> samples (N, *shape)."""

    def __init__(self, latent_dim: int, units: int, config: MlpConfig, shape: Shape, classes: int = 0) -> None:
        super().__init__()
        self.latent_dim, self.classes, self.shape = latent_dim, classes, shape
        self.blocks = nn.ModuleList(Hidden(units if i else latent_dim, units, config.pieces, classes)
                                    for i in range(config.layers))
        self.output = nn.Linear(units, math.prod(shape))
        he_normal(self.output, gain=1.0)

    def parts(self) -> Parts:
        return halves([], list(self.blocks), [self.output])

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            z = block(z, labels)
        return self.output(z).unflatten(1, self.shape)


class Discriminator(nn.Module):
    """samples (N, *shape) -> logits (N,)."""

    def __init__(self, units: int, config: DiscriminatorConfig, shape: Shape, classes: int = 0) -> None:
        super().__init__()
        self.classes = classes
        self.minibatch_std, extra = minibatch_std(config)
        inputs = [math.prod(shape), *[units] * (config.mlp.layers - 1)]
        inputs[-1] += extra
        self.blocks = nn.ModuleList(Hidden(inside, units, config.mlp.pieces) for inside in inputs)
        self.head = Head(units, classes)

    def features(self, samples: Tensor) -> Tensor:
        """What the head sees, (N, F)."""
        x = samples.flatten(1)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1](self.minibatch_std(x))

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head(self.features(samples), labels)


def make_mlp(generator: GeneratorConfig, discriminator: DiscriminatorConfig, shape: Shape,
             packed: int = 1) -> dict[str, nn.Module]:
    """Generator and discriminator for samples of any ``shape``; D sees ``packed`` of them."""
    return {"generator": Generator(generator.latent_dim, generator.channels, generator.mlp, shape, generator.classes),
            "discriminator": Discriminator(discriminator.channels, discriminator, (shape[0] * packed, *shape[1:]),
                                           generator.classes)}
