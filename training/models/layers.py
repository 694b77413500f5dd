"""Parts that several shapes share. Nothing here holds batch statistics: a sample's result does not depend on the others, but
for `MinibatchStd`, whose groups stay the same however a batch is split over ranks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, leaky_relu
from torch.nn.utils import parametrizations

from data_shards.errors import UserError
from training.models.config import DiscriminatorConfig, GeneratorConfig

SLOPE = 0.2
LEAKY_GAIN = math.sqrt(2 / (1 + SLOPE**2))
"""He et al. 2015, equation 15: what keeps the variance of a leaky ReLU's output."""

Shape = tuple[int, ...]
"""(C, H, W) of images, or (D,) of points."""
Size = tuple[int, int]
Modules = list[nn.Module]


class Parts(NamedTuple):
    """A generator's layers from the latent's side to the image's; each parameter is in exactly one of the three."""

    mapping: Modules  # before the first feature map
    early: Modules  # the coarser half
    late: Modules  # the finer half and what makes the image


def halves(mapping: Modules, blocks: Modules, output: Modules) -> Parts:
    middle = (len(blocks) + 1) // 2
    return Parts(mapping, blocks[:middle], [*blocks[middle:], *output])


def leaky(x: Tensor) -> Tensor:
    return leaky_relu(x, SLOPE)


def image_sizes(shape: Shape, model: str) -> list[Size]:
    """The (height, width) of each resolution, coarsest (shorter side 4 to 7) first: halved and rounded up.

    Raises:
        UserError: for what is no image of at least 8 pixels a side.
    """
    if len(shape) != 3 or min(shape[1:]) < 8:
        raise UserError(f"{model} makes images of at least 8 x 8 pixels, not samples of shape {shape}; "
                        "use the model mlp for points, or pack the set at another --size.")
    sizes = [(shape[1], shape[2])]
    while min(sizes[0]) > 7:
        sizes.insert(0, (-(-sizes[0][0] // 2), -(-sizes[0][1] // 2)))
    return sizes


def channel_counts(config: GeneratorConfig | DiscriminatorConfig, count: int) -> list[int]:
    """Channels of ``count`` resolutions, the finest first."""
    return [config.channels * min(2**i, config.growth) for i in range(count)]


def upsample(x: Tensor, size: Size) -> Tensor:
    """Bilinear, to exactly ``size``."""
    return interpolate(x, size=size, mode="bilinear", align_corners=False)


def halve(x: Tensor) -> Tensor:
    """Mean of 2 x 2, which is bilinear halving; an odd last row or column is averaged over what there is."""
    return nn.functional.avg_pool2d(x, 2, ceil_mode=True)


def he_normal(layer: nn.Conv2d | nn.Linear, gain: float = LEAKY_GAIN) -> None:
    """N(0, gain^2 / fan-in) weights and zero biases."""
    nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.weight[0].numel()))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def class_table(classes: int, size: int) -> nn.Embedding | None:
    """A row of ``size`` per class, all zero: a conditional network starts as its unconditional twin. None without classes."""
    if not classes:
        return None
    table = nn.Embedding(classes, size)
    nn.init.zeros_(table.weight)
    return table


def class_rows(table: nn.Embedding, labels: Tensor | None) -> Tensor:
    """Rows of ``labels`` (N,).

    Raises:
        UserError: when there are no labels.
    """
    if labels is None:
        raise UserError(f"this network is told one of {table.num_embeddings} classes for each image, and the images have no "
                        "labels; set training.generator.classes to 0 or pack the set with one subfolder per class.")
    rows: Tensor = table(labels)
    return rows


class Film(nn.Module):
    """x -> (1 + gamma_y) x + beta_y per channel and class y (Perez et al. 2018, FiLM); the identity without classes."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.class_embedding = class_table(classes, 2 * channels)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        if self.class_embedding is None:
            return x
        scale, shift = class_rows(self.class_embedding, labels).view(len(x), 2, -1, *[1] * (x.dim() - 2)).unbind(1)
        return x * (1 + scale) + shift


class Head(nn.Linear):
    """Features (N, F) -> logits (N,): psi(f) + <v_y, f>, the projection discriminator (Miyato and Koyama 2018, equation 4).

    No bias: a relativistic loss gives it no gradient but rounding noise, which Adam would blow up to full steps.
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__(features, 1, bias=False)
        self.class_embedding = class_table(classes, features)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = super().forward(features).squeeze(1)
        if self.class_embedding is None:
            return logits
        return logits + (class_rows(self.class_embedding, labels) * features).sum(1)


class MinibatchStd(nn.Module):
    """Appends a channel with the mean standard deviation over a group of samples (Karras et al. 2018, section 3).

    Of n samples, those n / group apart form a group. Rank r of W holds samples r, r + W, ... of the global batch
    (`World.slice`), so that a group lies on one rank and is the same one for every W that leaves each rank a multiple of
    ``group``. Real and generated samples in one call must alternate for the same reason.
    """

    def __init__(self, group: int) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) -> (N, C + 1, ...).

        Raises:
            UserError: when N is no multiple of the group.
        """
        if len(x) % self.group:
            raise UserError(f"{len(x)} images in one call of the discriminator do not divide into groups of "
                            f"training.discriminator.minibatch_std = {self.group}; choose batches that do on every worker.")
        grouped = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(0, (self.group, -1))
        deviation = (grouped.var(0, correction=0) + 1e-8).sqrt().flatten(1).mean(1).repeat(self.group)
        return torch.cat([x, deviation.to(x.dtype).view(-1, *[1] * (x.dim() - 1)).expand(-1, 1, *x.shape[2:])], 1)


def minibatch_std(config: DiscriminatorConfig) -> tuple[nn.Module, int]:
    """The layer that ``config`` asks for, and by how many channels it widens what it is given."""
    return (MinibatchStd(config.minibatch_std), 1) if config.minibatch_std else (nn.Identity(), 0)


def with_options(network: nn.Module, config: DiscriminatorConfig) -> nn.Module:
    """``network`` with spectral normalisation, where ``config`` asks for it, of every layer and table.

    Each forward in training mode takes one step of power iteration, so u and v depend on the number of forwards since the
    start; they are buffers, hence part of the state dict and equal on ranks that run the same steps from the same weights.
    """
    if config.spectral_norm:
        for module in list(network.modules()):
            if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
                if isinstance(module, nn.Embedding):  # a matrix of zeros has no direction
                    nn.init.normal_(module.weight)
                parametrizations.spectral_norm(module)
    return network
