"""CycleGAN's networks (Zhu et al. 2017, appendix 7.2): residual translators and patch discriminators, with instance
normalisation (Ulyanov et al. 2016), which looks at one image of the batch; both of a kind are one network, which one engine
steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, relu

from data_shards.errors import UserError
from training.models.history import History
from training.models.layers import Parts, Shape, halves


class Convolution(nn.Module):
    """Reflection-padded convolution, instance normalisation, and ReLU unless it is the last of a residual branch."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, active: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, padding_mode="reflect")
        self.norm = nn.InstanceNorm2d(outputs)
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return relu(x) if self.active else x


class Halving(nn.Module):
    """3 x 3 convolution of stride 2, instance normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.InstanceNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.norm(self.conv(x)))


class Doubling(nn.Module):
    """Transposed 3 x 3 convolution of stride 2, instance normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=1)
        self.norm = nn.InstanceNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.norm(self.conv(x)))


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = Convolution(channels, channels, 3), Convolution(channels, channels, 3, active=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class Translator(nn.Module):
    """images (N, inputs, H, W) -> images (N, outputs, H, W) in [-1, 1]; H and W are multiples of 4.

    ``channels`` at full resolution, 4 times as many at a quarter of it, where the residual blocks work; the paper has 64
    channels and 6 blocks up to 128 pixels, 9 above.
    """

    def __init__(self, inputs: int, outputs: int, channels: int = 64, blocks: int = 9) -> None:
        super().__init__()
        c = channels
        self.mapping = nn.ModuleList([Convolution(inputs, c, 7), Halving(c, 2 * c), Halving(2 * c, 4 * c)])
        self.blocks = nn.ModuleList([*[Residual(4 * c) for _ in range(blocks)], Doubling(4 * c, 2 * c), Doubling(2 * c, c)])
        self.output = nn.Conv2d(c, outputs, 7, padding=3, padding_mode="reflect")
        self.apply(_init)

    def parts(self) -> Parts:
        return halves(list(self.mapping), list(self.blocks), [self.output])

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[2] % 4 or images.shape[3] % 4 or min(images.shape[2:]) < 8:
            raise UserError(f"a translator halves images twice, which {images.shape[2]} x {images.shape[3]} pixels do not "
                            "allow; pack the set at a --size that 4 divides, of at least 8.")
        x = images
        for block in (*self.mapping, *self.blocks):
            x = block(x)
        return torch.tanh(self.output(x))


class PatchDiscriminator(nn.Module):
    """images (N, C, H, W) -> a logit per overlapping patch, (N, patches) (Isola et al. 2017; 3 halvings: 70 x 70 pixels)."""

    def __init__(self, image_channels: int, channels: int = 64, halvings: int = 3) -> None:
        super().__init__()
        widths = [channels * 2**min(i, 3) for i in range(halvings + 1)]
        self.blocks = nn.ModuleList(
            nn.Conv2d(inside, outside, 4, stride=2 if i < halvings else 1, padding=1)
            for i, (inside, outside) in enumerate(zip([image_channels, *widths], widths, strict=False)))
        self.norms = nn.ModuleList(nn.InstanceNorm2d(width) if i else nn.Identity() for i, width in enumerate(widths))
        self.head = nn.Conv2d(widths[-1], 1, 4, padding=1)
        self.smallest = 3 * 2**halvings  # 3 x 3 after the halvings, 2 x 2 and 1 x 1 after the last two convolutions
        self.apply(_init)

    def forward(self, images: Tensor) -> Tensor:
        if min(images.shape[2:]) < self.smallest:
            raise UserError(f"a patch of this discriminator does not fit {images.shape[2]} x {images.shape[3]} pixels; "
                            f"use images of at least {self.smallest}, or fewer halvings.")
        x = images
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = leaky_relu(norm(block(x)), 0.2)
        return self.head(x).flatten(1)


class Translators(nn.Module):
    """Both ways between domain A and domain B, for images of ``shape`` (C, H, W)."""

    def __init__(self, shape: Shape, channels: int = 64, blocks: int = 9) -> None:
        super().__init__()
        self.a_to_b, self.b_to_a = (Translator(shape[0], shape[0], channels, blocks) for _ in range(2))

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.a_to_b.blocks, *self.b_to_a.blocks]

    def forward(self, images_a: Tensor, images_b: Tensor) -> tuple[Tensor, Tensor]:
        """``images_a`` (N, C, H, W) as images of B, and ``images_b`` (M, C, H, W) as images of A."""
        return self.a_to_b(images_a), self.b_to_a(images_b)


class PatchDiscriminators(nn.Module):
    """One for each domain, with the history of translations into it."""

    def __init__(self, shape: Shape, channels: int = 64, halvings: int = 3, history: int = 50) -> None:
        super().__init__()
        self.a, self.b = (PatchDiscriminator(shape[0], channels, halvings) for _ in range(2))
        self.history_a, self.history_b = (History(history, shape) for _ in range(2))

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.a.blocks, *self.b.blocks]

    def forward(self, images_a: Tensor, images_b: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, patches) of ``images_a`` by A's discriminator, and of ``images_b`` by B's."""
        return self.a(images_a), self.b(images_b)


def _init(module: nn.Module) -> None:
    """N(0, 0.02^2), as in the paper."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
