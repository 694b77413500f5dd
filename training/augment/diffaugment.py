"""DiffAugment (Zhao et al. 2020): color, translation and cutout, each differentiable in the image."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

TRANSLATION, CUTOUT = 1 / 8, 1 / 2  # shares of the image's sides
TRANSFORMS = ("color", "translation", "cutout")
DRAWS = 10


def diffaugment(images: Tensor, draws: Tensor, p: float, transforms: Collection[str] = TRANSFORMS) -> Tensor:
    """Each of ``transforms`` is applied to each image with probability ``p``; the paper's p is 1.

    Args:
        images: (N, C, H, W), float, [-1, 1]; what lies beyond the border and what is cut out is 0, as in the paper.
        draws: (N, `DRAWS`) of U[0, 1).
    """
    u = draws.to(images.device, images.dtype)
    if "color" in transforms:
        images = torch.where(_spread(u[:, 0] < p), _color(images, *(_spread(u[:, i]) for i in (1, 2, 3))), images)
    if "translation" in transforms:
        images = torch.where(_spread(u[:, 4] < p), _translate(images, u[:, 5], u[:, 6]), images)
    if "cutout" in transforms:
        images = torch.where(_spread(u[:, 7] < p), _cut_out(images, u[:, 8], u[:, 9]), images)
    return images


def _spread(values: Tensor) -> Tensor:
    """(N,) -> (N, 1, 1, 1)"""
    return values[:, None, None, None]


def _color(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Brightness +-0.5, then the distance from grey times U[0, 2], then that from the image's mean times U[0.5, 1.5]."""
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * (2 * saturation) + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + 0.5) + mean


def _translate(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """By whole pixels, uniform up to `TRANSLATION` of the side either way."""
    for axis, u in ((2, down), (3, right)):
        size = images.shape[axis]
        reach = int(size * TRANSLATION + 0.5)
        shift = (u * (2 * reach + 1)).floor().long() - reach
        source = torch.arange(size, device=images.device) - shift[:, None]  # (N, size)
        inside = (source >= 0) & (source < size)
        shape = [len(images), 1, size, 1] if axis == 2 else [len(images), 1, 1, size]
        index = source.clamp(0, size - 1).view(shape).expand_as(images)
        images = images.gather(axis, index) * inside.view(shape)
    return images


def _cut_out(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """A rectangle of `CUTOUT` of both sides around a centre that is uniform over the image, cropped at its border."""
    kept: list[Tensor] = []
    for axis, u in ((2, down), (3, right)):
        size = images.shape[axis]
        side = int(size * CUTOUT + 0.5)
        start = (u * (size + 1 - side % 2)).floor() - side // 2
        place = torch.arange(size, device=images.device) - start[:, None]
        kept.append((place >= 0) & (place < side))
    return images * ~(kept[0][:, None, :, None] & kept[1][:, None, None, :])
