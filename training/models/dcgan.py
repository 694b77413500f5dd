"""DCGAN's shape (Radford et al. 2016) without batch normalisation, so that a result does not depend on how a batch was split.

Both networks are a list of blocks from the image's side of D and from the latent's side of G; methods freeze them by index.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from data_shards.errors import UserError
from training.models.config import DiscriminatorConfig, GeneratorConfig
from training.models.layers import SLOPE, Film, Head, Parts, Shape, channel_counts, halves, leaky, minibatch_std


class Generator(nn.Module):
    """z (N, latent_dim) -> images (N, C, H, H), about [-1, 1].

    No tanh at the end: on drawings that are mostly black it saturates and G stops learning (docs/LOG.md).
    """

    def __init__(self, latent_dim: int, widths: list[int], base: int, image_channels: int, classes: int = 0) -> None:
        super().__init__()
        self.latent_dim, self.classes = latent_dim, classes
        self.base_shape = (widths[0], base, base)
        self.project = nn.Linear(latent_dim, math.prod(self.base_shape))
        self.blocks = nn.ModuleList(
            nn.ConvTranspose2d(inside, outside, 4, stride=2, padding=1)
            for inside, outside in zip(widths, [*widths[1:], image_channels], strict=True))
        self.films = nn.ModuleList(Film(classes, width) for width in widths)
        self.apply(_init)
        nn.init.normal_(self.blocks[-1].weight, std=0.02)  # type: ignore[arg-type]  # Module.__getattr__ is untyped

    def parts(self) -> Parts:
        films = list(self.films)
        return halves([self.project, films[0]], [nn.ModuleList(pair) for pair in zip(self.blocks, films[1:], strict=False)],
                      [self.blocks[-1]])

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        x = leaky(self.films[0](self.project(z).unflatten(1, self.base_shape), labels))
        for block, film in zip(self.blocks, self.films[1:], strict=False):
            x = leaky(film(block(x), labels))
        return self.blocks[-1](x)


class Discriminator(nn.Module):
    """images (N, C, H, H), about [-1, 1] -> logits (N,)."""

    def __init__(self, widths: list[int], base: int, image_channels: int, config: DiscriminatorConfig,
                 classes: int = 0) -> None:
        super().__init__()
        self.classes = classes
        self.minibatch_std, extra = minibatch_std(config)
        inputs = [image_channels, *widths[:-1]]
        inputs[-1] += extra
        self.blocks = nn.ModuleList(nn.Conv2d(inside, outside, 4, stride=2, padding=1)
                                    for inside, outside in zip(inputs, widths, strict=True))
        self.head = Head(widths[-1] * base * base, classes)
        self.apply(_init)

    def features(self, images: Tensor) -> Tensor:
        """What the head sees, (N, F)."""
        x = images
        for block in self.blocks[:-1]:
            x = leaky(block(x))
        return leaky(self.blocks[-1](self.minibatch_std(x))).flatten(1)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head(self.features(images), labels)


def _init(module: nn.Module) -> None:
    """He initialisation for the slope; a stride-2 transposed kernel of 4 overlaps 2x2 taps, a quarter of its fan."""
    if isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
        if isinstance(module, nn.ConvTranspose2d):
            std = math.sqrt(2 / (1 + SLOPE**2) / (module.in_channels * 4))
            nn.init.normal_(module.weight, std=std)
        else:
            nn.init.kaiming_normal_(module.weight, a=SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def stages_of(shape: Shape) -> tuple[int, int]:
    """The coarsest side and the number of doublings from it to the image's.

    Raises:
        UserError: for an image that is not square or not 4..7 times a power of two.
    """
    if len(shape) != 3:
        raise UserError(f"dcgan makes images, not samples of shape {shape}; use the model mlp.")
    _, height, width = shape
    base, stages = height, 0
    while base > 7 and base % 2 == 0:
        base, stages = base // 2, stages + 1
    if height != width or not 4 <= base <= 7 or stages < 2:
        raise UserError(f"dcgan makes square images of 4 to 7 times a power of two (28, 32, 48, 64, ...), not "
                        f"{height} x {width}; pack the set at another --size.")
    return base, stages


def make_generator(config: GeneratorConfig, shape: Shape) -> Generator:
    base, stages = stages_of(shape)
    return Generator(config.latent_dim, channel_counts(config, stages)[::-1], base, shape[0], config.classes)


def make_dcgan(generator: GeneratorConfig, discriminator: DiscriminatorConfig, shape: Shape,
               packed: int = 1) -> dict[str, nn.Module]:
    """Generator and discriminator for images of ``shape`` (C, H, W); D sees ``packed`` of them.

    Raises:
        UserError: for an image that is not square or not 4..7 times a power of two.
    """
    base, stages = stages_of(shape)
    return {"generator": make_generator(generator, shape),
            "discriminator": Discriminator(channel_counts(discriminator, stages), base, shape[0] * packed,
                                           discriminator, generator.classes)}
