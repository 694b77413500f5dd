"""A small style-based generator (Karras et al. 2019, 2020: mapping network, modulated convolutions, noise, images summed over
resolutions) and the residual discriminator that goes with it (Karras et al. 2020, figure 7).

Differences from StyleGAN2, each for a reason: one style w per resolution and not per layer; noise and the second style of
style mixing are hashed from z (`noise.py`), so that a sample is a function of its latent; the mean style of truncation is
computed from fixed latents where it is asked for, since a running mean would lag behind and differ between ranks.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from training.draws import generator as draw
from training.models import noise
from training.models.config import DiscriminatorConfig, GeneratorConfig, StyleConfig
from training.models.layers import (
    LEAKY_GAIN,
    Head,
    Parts,
    Shape,
    Size,
    channel_counts,
    class_rows,
    class_table,
    halve,
    halves,
    he_normal,
    image_sizes,
    leaky,
    minibatch_std,
    upsample,
)

MIXING, SECOND, NOISE = 0, 1, 2
"""Streams of `noise`; block i takes NOISE + 2 i and the one after it."""
MEAN_LATENTS = 1024


class SlowLinear(nn.Linear):
    """A linear layer and leaky ReLU; weights are stored 1 / rate times too large, so that Adam moves them ``rate`` as fast."""

    def __init__(self, inputs: int, outputs: int, rate: float) -> None:
        super().__init__(inputs, outputs)
        self.rate = rate
        he_normal(self, gain=LEAKY_GAIN / rate)

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return leaky(linear(x, self.weight * self.rate, self.bias * self.rate))


class ModulatedConv(nn.Module):
    """x (N, I, h, w), style (N, D) -> (N, O, h, w) (Karras et al. 2020, equations 1 and 3).

    The style scales the input channels of the kernel, and demodulation gives each output channel's kernel the norm 1. Both
    are written as scales of input and output, so that one dense convolution serves the whole batch.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, style_dim: int, *, demodulate: bool = True,
                 gain: float = 1.0) -> None:
        super().__init__()
        self.demodulate, self.padding = demodulate, kernel // 2
        self.affine = nn.Linear(style_dim, inputs)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel) * gain / math.sqrt(inputs * kernel**2))
        he_normal(self.affine, gain=1.0)
        nn.init.ones_(self.affine.bias)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        scale = self.affine(style)
        y = conv2d(x * scale[:, :, None, None], self.weight, padding=self.padding)
        if not self.demodulate:
            return y
        norm = linear(scale.square(), self.weight.square().sum((2, 3)))
        return y * (norm.to(torch.promote_types(norm.dtype, torch.float32)) + 1e-8).rsqrt()[:, :, None, None].to(y.dtype)


class StyledLayer(nn.Module):
    """Modulated 3 x 3 convolution, noise, bias, leaky ReLU that keeps the variance."""

    def __init__(self, inputs: int, outputs: int, config: StyleConfig) -> None:
        super().__init__()
        self.conv = ModulatedConv(inputs, outputs, 3, config.dim)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.noise_strength = nn.Parameter(torch.zeros(1)) if config.noise else None

    def forward(self, x: Tensor, style: Tensor, z: Tensor | None, stream: int) -> Tensor:
        """Noise is hashed from z; None leaves it out."""
        x = self.conv(x, style)
        if self.noise_strength is not None and z is not None:
            height, width = x.shape[2:]
            field = noise.normal(z, stream, height * width).view(-1, 1, height, width)
            x = x + self.noise_strength.to(x.dtype) * field.to(x.dtype)
        return leaky(x + self.bias.to(x.dtype)[:, None, None]) * LEAKY_GAIN


class StyleBlock(nn.Module):
    """One resolution: layers on the features, and what they add to the image."""

    def __init__(self, inputs: int, channels: int, size: Size, image_channels: int, config: StyleConfig, *,
                 first: bool, gain: float) -> None:
        super().__init__()
        self.size = size
        before = [inputs] if first else [inputs, channels]
        self.layers = nn.ModuleList(StyledLayer(inside, channels, config) for inside in before)
        self.to_image = ModulatedConv(channels, image_channels, 1, config.dim, demodulate=False, gain=gain)
        self.image_bias = nn.Parameter(torch.zeros(image_channels))

    def forward(self, x: Tensor, image: Tensor | None, style: Tensor, z: Tensor | None, stream: int) -> tuple[Tensor, Tensor]:
        if x.shape[2:] != self.size:
            x = upsample(x, self.size)
        for i, layer in enumerate(self.layers):
            x = layer(x, style, z, stream + i)
        added = self.to_image(x, style) + self.image_bias[:, None, None]
        return x, added if image is None else upsample(image, self.size) + added


class Generator(nn.Module):
    """z (N, latent_dim) -> images (N, C, H, W), about [-1, 1].

    In training mode the finer blocks of a share ``mixing`` of the images take the style of a second latent (style mixing).
    """

    def __init__(self, latent_dim: int, widths: list[int], sizes: list[Size], image_channels: int, config: StyleConfig,
                 classes: int = 0) -> None:
        super().__init__()
        self.latent_dim, self.classes, self.mixing = latent_dim, classes, config.mixing
        self.class_embedding = class_table(classes, latent_dim)
        self.mapping = nn.ModuleList(SlowLinear(config.dim if i else latent_dim, config.dim, config.mapping_lr)
                                     for i in range(config.mapping_layers))
        self.constant = nn.Parameter(torch.randn(widths[0], *sizes[0]))
        self.blocks = nn.ModuleList(
            StyleBlock(inside, width, size, image_channels, config, first=not i, gain=len(sizes)**-0.5)
            for i, (inside, width, size) in enumerate(zip([widths[0], *widths[:-1]], widths, sizes, strict=True)))

    def parts(self) -> Parts:
        tables = [self.class_embedding] if self.class_embedding is not None else []
        return halves([*tables, *self.mapping, nn.ParameterList([self.constant])], list(self.blocks), [])

    def styles(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """z (N, latent_dim) -> w (N, style.dim). z is brought to unit mean square; a class adds its row to it."""
        x = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        if self.class_embedding is not None:
            x = x + class_rows(self.class_embedding, labels)
        for layer in self.mapping:
            x = layer(x)
        return x

    def mean_style(self, labels: Tensor | None = None) -> Tensor:
        """The mean w, (1, dim); with ``labels`` (N,) that of each one's class, (N, dim). A function of the weights alone."""
        table = self.class_embedding
        device = self.constant.device
        z = torch.randn(MEAN_LATENTS, self.latent_dim, generator=draw(0, "mean style", 0)).to(device)
        if table is None:
            return self.styles(z).mean(0, keepdim=True)
        means = torch.cat([self.styles(z, torch.full((MEAN_LATENTS,), label, device=device)).mean(0, keepdim=True)
                           for label in range(self.classes)])
        return means.mean(0, keepdim=True) if labels is None else means[labels]

    def synthesis(self, styles: Tensor, z: Tensor | None = None) -> Tensor:
        """Images of a style for each block, (N, blocks, dim); noise hashed from z (N, any), none without z."""
        x, image = self.constant.expand(len(styles), -1, -1, -1), None
        for i, block in enumerate(self.blocks):
            x, image = block(x, image, styles[:, i], z, NOISE + 2 * i)
        assert image is not None
        return image

    def forward(self, z: Tensor, labels: Tensor | None = None, truncation: float = 1.0) -> Tensor:
        """``truncation`` psi moves each style to mean + psi (w - mean) (Karras et al. 2019, appendix B); 1 leaves it."""
        style = self.styles(z, labels)
        if truncation != 1:
            style = self.mean_style(labels).lerp(style, truncation)
        styles = style[:, None].expand(-1, len(self.blocks), -1)
        if self.training and self.mixing:
            styles = self._mixed(styles, z, labels)
        return self.synthesis(styles, z)

    def _mixed(self, styles: Tensor, z: Tensor, labels: Tensor | None) -> Tensor:
        """From a drawn block on the second style, for the drawn share of the images."""
        chance, place = noise.uniform(z, MIXING, 2)[:, :, None].unbind(1)
        crossover = 1 + (place * (len(self.blocks) - 1)).floor()
        second = self.styles(noise.normal(z, SECOND, self.latent_dim), labels)
        taken = (torch.arange(len(self.blocks), device=z.device) >= crossover) & (chance < self.mixing)
        return torch.where(taken[:, :, None], second[:, None], styles)


class DownBlock(nn.Module):
    """Two 3 x 3 convolutions to half the size, beside a 1 x 1 one; their sum keeps the variance."""

    def __init__(self, inputs: int, outputs: int, *, image_channels: int = 0) -> None:
        super().__init__()
        self.from_image = nn.Conv2d(image_channels, inputs, 1) if image_channels else None
        self.conv1, self.conv2 = nn.Conv2d(inputs, inputs, 3, padding=1), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1, bias=False)
        for layer in (self.conv1, self.conv2, *([self.from_image] if self.from_image else [])):
            he_normal(layer)
        he_normal(self.skip, gain=1.0)

    def forward(self, x: Tensor) -> Tensor:
        if self.from_image is not None:
            x = leaky(self.from_image(x))
        y = leaky(self.conv2(halve(leaky(self.conv1(x)))))
        return (y + self.skip(halve(x))) * math.sqrt(0.5)


class Tail(nn.Module):
    """The coarsest resolution, as features (N, channels)."""

    def __init__(self, channels: int, base: Size, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.minibatch_std, extra = minibatch_std(config)
        self.conv = nn.Conv2d(channels + extra, channels, 3, padding=1)
        self.linear = nn.Linear(channels * math.prod(base), channels)
        he_normal(self.conv)
        he_normal(self.linear)

    def forward(self, x: Tensor) -> Tensor:
        return leaky(self.linear(leaky(self.conv(self.minibatch_std(x))).flatten(1)))


class Discriminator(nn.Module):
    """images (N, C, H, W), about [-1, 1] -> logits (N,)."""

    def __init__(self, widths: list[int], base: Size, image_channels: int, config: DiscriminatorConfig,
                 classes: int = 0) -> None:
        super().__init__()
        self.classes = classes
        self.blocks = nn.ModuleList(DownBlock(*pair, image_channels=0 if i else image_channels)
                                    for i, pair in enumerate(pairwise(widths)))
        self.blocks.append(Tail(widths[-1], base, config))
        self.head = Head(widths[-1], classes)
        he_normal(self.head, gain=1.0)

    def features(self, images: Tensor) -> Tensor:
        """What the head sees, (N, F)."""
        x = images
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head(self.features(images), labels)


def make_style(generator: GeneratorConfig, discriminator: DiscriminatorConfig, shape: Shape,
               packed: int = 1) -> dict[str, nn.Module]:
    """Generator and discriminator for images of ``shape`` (C, H, W); D sees ``packed`` of them.

    Raises:
        UserError: for an image with a side under 8 pixels.
    """
    sizes = image_sizes(shape, "style")
    return {"generator": Generator(generator.latent_dim, channel_counts(generator, len(sizes))[::-1], sizes, shape[0],
                                   generator.style, generator.classes),
            "discriminator": Discriminator(channel_counts(discriminator, len(sizes)), sizes[0], shape[0] * packed,
                                           discriminator, generator.classes)}
