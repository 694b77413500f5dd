"""R3GAN's shape (Huang et al. 2024, "The GAN is dead; long live the GAN!", section 4): no normalisation, fix-up initialisation,
grouped convolutions in inverted bottlenecks, bilinear resampling. ``group_channels: 0`` makes the convolutions dense, for CPUs.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from data_shards.errors import UserError
from training.models.config import DiscriminatorConfig, GeneratorConfig, R3ganConfig
from training.models.layers import (
    LEAKY_GAIN,
    Film,
    Head,
    Parts,
    Shape,
    Size,
    channel_counts,
    halve,
    halves,
    he_normal,
    image_sizes,
    leaky,
    minibatch_std,
    upsample,
)

LAYERS = 3
"""Linear layers in a residual block, m in the fix-up rule."""


class Residual(nn.Module):
    """x + f(x), f: 1 x 1, grouped 3 x 3, 1 x 1 convolution, leaky ReLU between them.

    Fix-up (Zhang et al. 2019, section 3): the last layer starts at 0, the others at He's scale times L^(-1 / (2m - 2)) for L
    blocks of m layers, so that depth does not change the size of a step.
    """

    def __init__(self, channels: int, config: R3ganConfig, total_blocks: int) -> None:
        super().__init__()
        inner = channels * config.expansion
        groups = max(1, inner // config.group_channels) if config.group_channels else 1
        if groups > 1 and inner % config.group_channels:
            raise UserError(f"r3gan.group_channels = {config.group_channels} does not divide the {inner} inner channels of a "
                            f"block of {channels}; use a divisor of it, or 0 for dense convolutions.")
        self.conv1 = nn.Conv2d(channels, inner, 1)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, groups=groups)
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)
        gain = LEAKY_GAIN * total_blocks ** (-1 / (2 * LAYERS - 2))
        he_normal(self.conv1, gain)
        he_normal(self.conv2, gain)
        nn.init.zeros_(self.conv3.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv3(leaky(self.conv2(leaky(self.conv1(x)))))


def _linear(inputs: int, outputs: int) -> nn.Module:
    """A 1 x 1 convolution of gain 1, left out where it would change no number of channels."""
    if inputs == outputs:
        return nn.Identity()
    layer = nn.Conv2d(inputs, outputs, 1, bias=False)
    he_normal(layer, gain=1.0)
    return layer


def _residuals(channels: int, config: R3ganConfig, resolutions: int) -> nn.Sequential:
    return nn.Sequential(*[Residual(channels, config, config.blocks * resolutions) for _ in range(config.blocks)])


class Basis(nn.Module):
    """z (N, latent_dim) -> (N, C, h, w): a learned pattern per channel, weighted by a linear map of z."""

    def __init__(self, latent_dim: int, channels: int, size: Size) -> None:
        super().__init__()
        self.patterns = nn.Parameter(torch.randn(channels, *size))
        self.linear = nn.Linear(latent_dim, channels, bias=False)
        he_normal(self.linear, gain=1.0)

    def forward(self, z: Tensor) -> Tensor:
        return self.patterns * self.linear(z)[:, :, None, None]


class GeneratorStage(nn.Module):
    """One resolution: brought to ``size`` (unless the basis made it), scaled and shifted by class, residual blocks."""

    def __init__(self, inputs: int, channels: int, size: Size, config: R3ganConfig, resolutions: int, classes: int) -> None:
        super().__init__()
        self.size = size
        self.linear = _linear(inputs, channels)
        self.film = Film(classes, channels)
        self.residuals = _residuals(channels, config, resolutions)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        x = self.linear(x)
        if x.shape[2:] != self.size:
            x = upsample(x, self.size)
        return self.residuals(self.film(x, labels))


class Generator(nn.Module):
    """z (N, latent_dim) -> images (N, C, H, W), about [-1, 1]."""

    def __init__(self, latent_dim: int, widths: list[int], sizes: list[Size], image_channels: int, config: R3ganConfig,
                 classes: int = 0) -> None:
        super().__init__()
        self.latent_dim, self.classes = latent_dim, classes
        self.basis = Basis(latent_dim, widths[0], sizes[0])
        self.blocks = nn.ModuleList(
            GeneratorStage(inside, width, size, config, len(sizes), classes)
            for inside, width, size in zip([widths[0], *widths[:-1]], widths, sizes, strict=True))
        self.output = nn.Conv2d(widths[-1], image_channels, 1, bias=False)
        he_normal(self.output, gain=1.0)

    def parts(self) -> Parts:
        return halves([self.basis], list(self.blocks), [self.output])

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.basis(z)
        for block in self.blocks:
            x = block(x, labels)
        return self.output(x)


class DiscriminatorStage(nn.Module):
    """One resolution: residual blocks, then half the size and the next one's channels."""

    def __init__(self, channels: int, outputs: int, config: R3ganConfig, resolutions: int, *, image_channels: int = 0) -> None:
        super().__init__()
        self.extraction = _linear(image_channels or channels, channels)
        self.residuals = _residuals(channels, config, resolutions)
        self.linear = _linear(channels, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(halve(self.residuals(self.extraction(x))))


class Discriminator(nn.Module):
    """images (N, C, H, W), about [-1, 1] -> logits (N,)."""

    def __init__(self, widths: list[int], base: Size, image_channels: int, config: DiscriminatorConfig,
                 classes: int = 0) -> None:
        super().__init__()
        self.classes = classes
        count = len(widths)
        self.blocks = nn.ModuleList(
            DiscriminatorStage(width, after, config.r3gan, count, image_channels=0 if i else image_channels)
            for i, (width, after) in enumerate(pairwise(widths)))
        self.blocks.append(_residuals(widths[-1], config.r3gan, count))
        self.minibatch_std, extra = minibatch_std(config)
        channels = widths[-1] + extra
        self.basis = nn.Conv2d(channels, channels, base, groups=channels, bias=False)
        he_normal(self.basis, gain=1.0)
        self.head = Head(channels, classes)
        he_normal(self.head, gain=1.0)

    def features(self, images: Tensor) -> Tensor:
        """What the head sees, (N, F)."""
        x = images
        for block in self.blocks:
            x = block(x)
        return self.basis(self.minibatch_std(x)).flatten(1)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head(self.features(images), labels)


def make_r3gan(generator: GeneratorConfig, discriminator: DiscriminatorConfig, shape: Shape,
               packed: int = 1) -> dict[str, nn.Module]:
    """Generator and discriminator for images of ``shape`` (C, H, W); D sees ``packed`` of them.

    Raises:
        UserError: for an image with a side under 8 pixels, groups that do not divide the channels, and spectral normalisation.
    """
    if discriminator.spectral_norm:
        raise UserError("training.discriminator.spectral_norm does not go with the model r3gan, whose residual branches "
                        "start at 0, where there is no largest direction; use resnet, or leave it off.")
    sizes = image_sizes(shape, "r3gan")
    return {"generator": Generator(generator.latent_dim, channel_counts(generator, len(sizes))[::-1], sizes, shape[0],
                                   generator.r3gan, generator.classes),
            "discriminator": Discriminator(channel_counts(discriminator, len(sizes)), sizes[0], shape[0] * packed,
                                           discriminator, generator.classes)}
