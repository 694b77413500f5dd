"""Encoders and decoders of variational autoencoders (Kingma and Welling 2014): fully connected, or convolutional in DCGAN's
shape.

Encoder and decoder are one network, so that one engine steps both; it maps latents to samples like a generator does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from training.models.config import DiscriminatorConfig, GeneratorConfig
from training.models.dcgan import Discriminator, make_generator, stages_of
from training.models.layers import Film, Parts, Shape, channel_counts, he_normal, leaky
from training.models.mlp import Generator as MlpGenerator
from training.models.mlp import Hidden


class Encoder(nn.Module):
    """samples (N, *shape) -> mean and log-variance of q(z | x), each (N, latent_dim)."""

    def __init__(self, body: nn.Module, features: int, latent_dim: int, classes: int = 0) -> None:
        super().__init__()
        self.body = body
        self.film = Film(classes, features)
        self.moments = nn.Linear(features, 2 * latent_dim)
        he_normal(self.moments, gain=0.1)  # q starts near the prior N(0, I)

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.moments(self.film(self.body(samples), labels)).chunk(2, dim=1)
        return mean, log_variance


class Autoencoder(nn.Module):
    """``encode``: samples (N, *shape) -> (mean, log-variance); ``decode``: z (N, latent_dim) -> outputs (N, *shape), unbounded;
    forward: z -> samples, the ``mean`` of what the outputs say.

    The outputs are means of a Gaussian or Laplace, or logits of a Bernoulli: the likelihood says which, and its mean function
    is ``mean``.
    """

    def __init__(self, encoder: Encoder, decoder: nn.Module, latent_dim: int, classes: int) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.latent_dim, self.classes = latent_dim, classes
        self.mean: Callable[[Tensor], Tensor] = _as_it_is

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder's from the latent's side, then the encoder's from the samples' side."""
        return [block for half in (self.decoder, self.encoder.body) for block in cast(nn.ModuleList, half.blocks)]

    def parts(self) -> Parts:
        """Those of the decoder."""
        parts: Parts = self.decoder.parts()  # type: ignore[operator]  # Module.__getattr__ is untyped
        return parts

    def encode(self, samples: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(samples, labels)
        return mean, log_variance

    def decode(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        outputs: Tensor = self.decoder(z, labels)
        return outputs

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.mean(self.decode(z, labels))

    def compile(self, *arguments: Any, **named: Any) -> None:
        """Of both halves: training runs them by themselves."""
        self.encoder.compile(*arguments, **named)
        self.decoder.compile(*arguments, **named)


def _as_it_is(outputs: Tensor) -> Tensor:
    return outputs


class Layers(nn.Module):
    """Flattened samples through hidden layers, (N, *shape) -> (N, units)."""

    def __init__(self, inputs: int, units: int, layers: int, pieces: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Hidden(units if i else inputs, units, pieces) for i in range(layers))

    def forward(self, samples: Tensor) -> Tensor:
        x = samples.flatten(1)
        for block in self.blocks:
            x = block(x)
        return x


class Features(nn.Module):
    """A discriminator of DCGAN's shape without its head, (N, C, H, H) -> (N, F)."""

    def __init__(self, widths: list[int], base: int, image_channels: int) -> None:
        super().__init__()
        body = Discriminator(widths, base, image_channels, DiscriminatorConfig())
        self.blocks, self.features = body.blocks, widths[-1] * base * base

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for block in self.blocks:
            x = leaky(block(x))
        return x.flatten(1)


def make_mlp(config: GeneratorConfig, shape: Shape) -> Autoencoder:
    """``config.mlp.layers`` hidden layers of ``config.channels`` units on either side, for samples of any ``shape``."""
    body = Layers(math.prod(shape), config.channels, config.mlp.layers, config.mlp.pieces)
    decoder = MlpGenerator(config.latent_dim, config.channels, config.mlp, shape, config.classes)
    return Autoencoder(Encoder(body, config.channels, config.latent_dim, config.classes), decoder, config.latent_dim,
                       config.classes)


def make_conv(config: GeneratorConfig, shape: Shape) -> Autoencoder:
    """DCGAN's discriminator without its head, and its generator.

    Raises:
        UserError: for an image that is not square or not 4..7 times a power of two.
    """
    base, stages = stages_of(shape)
    body = Features(channel_counts(config, stages), base, shape[0])
    return Autoencoder(Encoder(body, body.features, config.latent_dim, config.classes), make_generator(config, shape),
                       config.latent_dim, config.classes)


AUTOENCODERS: dict[str, Callable[[GeneratorConfig, Shape], Autoencoder]] = {"mlp": make_mlp, "dcgan": make_conv}
"""By the same names as in `training.models.MODELS`."""
