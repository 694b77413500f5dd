"""SNGAN's residual shape (Miyato et al. 2018, appendix B.4) at any resolution.

Where the paper has (conditional) batch normalisation, G has group normalisation (Wu and He 2018), which looks at one sample,
and a scale and shift per class. D has no normalisation but, by option, the spectral one.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn.functional import relu

from training.models.config import DiscriminatorConfig, GeneratorConfig
from training.models.layers import (
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
    minibatch_std,
    upsample,
)


class Normalised(nn.Module):
    """ReLU of the group-normalised input, scaled and shifted by class."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(channels // 4 or 1, channels, 32), channels)
        self.film = Film(classes, channels)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        return relu(self.film(self.norm(x), labels))


class Up(nn.Module):
    """Residual block that ends at ``size``."""

    def __init__(self, inputs: int, outputs: int, size: Size, classes: int) -> None:
        super().__init__()
        self.size = size
        self.first, self.second = Normalised(inputs, classes), Normalised(outputs, classes)
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        y = self.conv1(upsample(self.first(x, labels), self.size))
        return self.conv2(self.second(y, labels)) + upsample(self.skip(x), self.size)


class Generator(nn.Module):
    """z (N, latent_dim) -> images (N, C, H, W), about [-1, 1]."""

    def __init__(self, latent_dim: int, widths: list[int], sizes: list[Size], image_channels: int, classes: int = 0) -> None:
        super().__init__()
        self.latent_dim, self.classes = latent_dim, classes
        self.base_shape = (widths[0], *sizes[0])
        self.project = nn.Linear(latent_dim, math.prod(self.base_shape))
        self.blocks = nn.ModuleList(Up(inside, outside, size, classes)
                                    for inside, outside, size in zip(widths, widths[1:], sizes[1:], strict=False))
        self.normalised = Normalised(widths[-1], classes)
        self.output = nn.Conv2d(widths[-1], image_channels, 3, padding=1)
        self.apply(_init)

    def parts(self) -> Parts:
        return halves([self.project], list(self.blocks), [self.normalised, self.output])

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.project(z).unflatten(1, self.base_shape)
        for block in self.blocks:
            x = block(x, labels)
        return self.output(self.normalised(x, labels))


class Down(nn.Module):
    """Residual block that ends at half the size, or at the same without ``down``; the image's own has no ReLU before it."""

    def __init__(self, inputs: int, outputs: int, *, first: bool = False, down: bool = True) -> None:
        super().__init__()
        self.first, self.down = first, down
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if down or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(relu(self.conv1(x if self.first else relu(x))))
        return halve(y) + self.skip(halve(x)) if self.down else y + self.skip(x)


class Discriminator(nn.Module):
    """images (N, C, H, W), about [-1, 1] -> logits (N,). The paper's block without halving follows at the coarsest size."""

    def __init__(self, widths: list[int], base: Size, image_channels: int, config: DiscriminatorConfig,
                 classes: int = 0) -> None:
        super().__init__()
        self.classes = classes
        self.minibatch_std, extra = minibatch_std(config)
        inputs = [image_channels, *widths]
        self.blocks = nn.ModuleList(Down(inside, outside, first=not i)
                                    for i, (inside, outside) in enumerate(zip(inputs, widths, strict=False)))
        self.blocks.append(Down(widths[-1] + extra, widths[-1], down=False))
        self.head = Head(widths[-1], classes)
        self.apply(_init)
        he_normal(self.head, gain=1 / math.prod(base))  # its features are sums over places

    def features(self, images: Tensor) -> Tensor:
        """What the head sees, (N, F): the sum over places."""
        x = images
        for block in self.blocks[:-1]:
            x = block(x)
        return relu(self.blocks[-1](self.minibatch_std(x))).sum((2, 3))

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head(self.features(images), labels)


def _init(module: nn.Module) -> None:
    """Gain sqrt(2), He's for a ReLU, before the second convolution of a branch, and 1 elsewhere."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        he_normal(module, gain=1.0)
    if isinstance(module, Up | Down):
        he_normal(module.conv1, gain=math.sqrt(2))


def make_resnet(generator: GeneratorConfig, discriminator: DiscriminatorConfig, shape: Shape,
                packed: int = 1) -> dict[str, nn.Module]:
    """Generator and discriminator for images of ``shape`` (C, H, W); D sees ``packed`` of them.

    Raises:
        UserError: for an image with a side under 8 pixels.
    """
    sizes = image_sizes(shape, "resnet")
    return {"generator": Generator(generator.latent_dim, channel_counts(generator, len(sizes))[::-1], sizes, shape[0],
                                   generator.classes),
            "discriminator": Discriminator(channel_counts(discriminator, len(sizes) - 1), sizes[0],
                                           shape[0] * packed, discriminator, generator.classes)}
