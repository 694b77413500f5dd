"""DCGAN's shape (Radford et al. 2016) without batch normalisation, so that a result does not depend on how a batch was split.

Both networks are a list of blocks from the image's side of D and from the latent's side of G; methods freeze them by index.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from data_shards.errors import UserError
from training.models.config import DiscriminatorConfig, GeneratorConfig

SLOPE = 0.2


class Generator(nn.Module):
    """z (N, latent_dim) -> images (N, C, H, H), about [-1, 1].

    No tanh at the end: on drawings that are mostly black it saturates and G stops learning (docs/LOG.md).
    """

    def __init__(self, latent_dim: int, widths: list[int], base: int, image_channels: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.base_shape = (widths[0], base, base)
        self.project = nn.Linear(latent_dim, math.prod(self.base_shape))
        self.blocks = nn.ModuleList(
            nn.ConvTranspose2d(inside, outside, 4, stride=2, padding=1)
            for inside, outside in zip(widths, [*widths[1:], image_channels], strict=True))
        self.apply(_init)
        nn.init.normal_(self.blocks[-1].weight, std=0.02)  # type: ignore[arg-type]  # Module.__getattr__ is untyped

    def forward(self, z: Tensor) -> Tensor:
        x = nn.functional.leaky_relu(self.project(z), SLOPE).unflatten(1, self.base_shape)
        for block in self.blocks[:-1]:
            x = nn.functional.leaky_relu(block(x), SLOPE)
        return self.blocks[-1](x)


class Discriminator(nn.Module):
    """images (N, C, H, H), about [-1, 1] -> logits (N,)."""

    def __init__(self, widths: list[int], base: int, image_channels: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Conv2d(inside, outside, 4, stride=2, padding=1)
            for inside, outside in zip([image_channels, *widths[:-1]], widths, strict=True))
        # No bias: a relativistic loss gives it no gradient but rounding noise, which Adam would blow up to full steps.
        self.head = nn.Linear(widths[-1] * base * base, 1, bias=False)
        self.apply(_init)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for block in self.blocks:
            x = nn.functional.leaky_relu(block(x), SLOPE)
        return self.head(x.flatten(1)).squeeze(1)


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


def make_dcgan(generator: GeneratorConfig, discriminator: DiscriminatorConfig,
               image_shape: tuple[int, int, int]) -> dict[str, nn.Module]:
    """Generator and discriminator for images of ``image_shape`` (C, H, W).

    Raises:
        UserError: for an image that is not square or not 4..7 times a power of two.
    """
    channels, height, width = image_shape
    base, stages = height, 0
    while base > 7 and base % 2 == 0:
        base, stages = base // 2, stages + 1
    if height != width or not 4 <= base <= 7 or stages < 2:
        raise UserError(f"dcgan makes square images of 4 to 7 times a power of two (28, 32, 48, 64, ...), not "
                        f"{height} x {width}; pack the set at another --size.")
    up = [generator.channels * 2**min(i, 3) for i in reversed(range(stages))]
    down = [discriminator.channels * 2**min(i, 3) for i in range(stages)]
    return {"generator": Generator(generator.latent_dim, up, base, channels),
            "discriminator": Discriminator(down, base, channels)}
