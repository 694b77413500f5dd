"""The transforms of ADA (Karras et al. 2020, appendix B): pixel blitting and geometry through one resampling, color through one
matrix. Left out are its image-space filtering, noise and cutout, which the paper's best setting does not use either.

Resampling is bilinear with reflection at the border, without the paper's oversampling, so a moved image is a little softer. An
image that no geometric transform was drawn for is not resampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor
from torch.nn import functional

TRANSFORMS = ("flip", "rotate90", "shift", "scale", "rotate", "stretch", "fractional_shift",
              "brightness", "contrast", "luma_flip", "hue", "saturation")
DRAWS = 2 + 2 + 3 + 2 + 4 + 2 + 3 + 2 + 2 + 2 + 2 + 2
SHIFT, SHIFT_SD, SCALE_SD = 0.125, 0.125, 0.2  # shares of the side; log2
BRIGHTNESS_SD, CONTRAST_SD, SATURATION_SD = 0.2, 0.5, 1.0  # of [-1, 1]; log2; log2


def ada(images: Tensor, draws: Tensor, p: float, transforms: Collection[str] = TRANSFORMS) -> Tensor:
    """Each of ``transforms`` is drawn for each image with probability ``p``, in the paper's order and distributions.

    Args:
        images: (N, C, H, W), float, [-1, 1]. Saturation needs C > 1 and hue C = 3; else they do nothing.
        draws: (N, `DRAWS`) of U[0, 1), float64.
    """
    matrix, moved = _geometry(draws, p, transforms, *images.shape[2:])
    warped = _resample(images, matrix.to(images.device, images.dtype))
    images = torch.where(moved.to(images.device)[:, None, None, None], warped, images)
    color, offset = _color(draws, p, transforms, images.shape[1])
    flat = torch.baddbmm(offset.to(images.device, images.dtype), color.to(images.device, images.dtype), images.flatten(2))
    return flat.view_as(images)


class _Draws:
    """Hands out the columns of the draws in the order asked for: the same ones whatever transforms are left out."""

    def __init__(self, draws: Tensor) -> None:
        self.columns = iter(draws.double().clamp(2**-53, 1 - 2**-53).unbind(1))

    def gate(self, p: float, wanted: bool) -> Tensor:
        """(N,) bool, true with probability p."""
        return (next(self.columns) < p) & wanted

    def uniform(self) -> Tensor:
        return next(self.columns)

    def normal(self) -> Tensor:
        return torch.special.ndtri(next(self.columns))


def _geometry(draws: Tensor, p: float, transforms: Collection[str], height: int, width: int) -> tuple[Tensor, Tensor]:
    """For each image the matrix (N, 3, 3) that takes a pixel's place in the result to its place in the source, both in pixels
    from the image's centre (x right, y down), and whether it is not the identity."""
    u = _Draws(draws[:, :18])
    matrix = torch.eye(3, dtype=torch.float64).repeat(len(draws), 1, 1)
    moved = torch.zeros(len(draws), dtype=torch.bool)

    def then(gate: Tensor, inverse: Tensor) -> None:
        nonlocal matrix, moved
        matrix = torch.where(gate[:, None, None], matrix @ inverse, matrix)
        moved = moved | gate

    gate, flip = u.gate(p, "flip" in transforms), u.uniform() < 0.5
    then(gate & flip, _affine(-torch.ones_like(flip, dtype=torch.float64)))
    gate, quarter = u.gate(p, "rotate90" in transforms), (u.uniform() * 4).floor()
    then(gate & (quarter > 0), _rotation(quarter * (math.pi / 2)))
    gate, x, y = u.gate(p, "shift" in transforms), 2 * u.uniform() - 1, 2 * u.uniform() - 1
    then(gate, _affine(dx=-(x * SHIFT * width).round(), dy=-(y * SHIFT * height).round()))
    gate, scale = u.gate(p, "scale" in transforms), torch.exp2(SCALE_SD * u.normal())
    then(gate, _affine(1 / scale, 1 / scale))
    either = 1 - math.sqrt(1 - min(p, 1.0))  # so that one of the two rotations happens with probability p
    gate, angle = u.gate(either, "rotate" in transforms), math.pi * (2 * u.uniform() - 1)
    after_gate, after = u.gate(either, "rotate" in transforms), math.pi * (2 * u.uniform() - 1)
    then(gate, _rotation(angle))
    gate, scale = u.gate(p, "stretch" in transforms), torch.exp2(SCALE_SD * u.normal())
    then(gate, _affine(1 / scale, scale))
    then(after_gate, _rotation(after))
    gate, x, y = u.gate(p, "fractional_shift" in transforms), SHIFT_SD * u.normal(), SHIFT_SD * u.normal()
    then(gate, _affine(dx=-x * width, dy=-y * height))
    return matrix, moved


def _affine(sx: Tensor | float = 1.0, sy: Tensor | float = 1.0, dx: Tensor | float = 0.0, dy: Tensor | float = 0.0) -> Tensor:
    """(N, 3, 3): scaling and shift."""
    columns = [torch.as_tensor(value, dtype=torch.float64).reshape(-1) for value in (sx, sy, dx, dy)]
    a, d, x, y = torch.broadcast_tensors(*columns)
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    return torch.stack([a, zero, x, zero, d, y, zero, zero, one], 1).view(-1, 3, 3)


def _rotation(angle: Tensor) -> Tensor:
    """(N, 3, 3): by ``angle`` around the centre."""
    sine, cosine, zero, one = angle.sin(), angle.cos(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([cosine, sine, zero, -sine, cosine, zero, zero, zero, one], 1).view(-1, 3, 3)


def _resample(images: Tensor, matrix: Tensor) -> Tensor:
    """Images at the places that ``matrix`` (N, 3, 3) names, in pixels from the centre."""
    n, _, height, width = images.shape
    half = torch.tensor([width / 2, height / 2, 1.0], device=images.device, dtype=images.dtype)
    theta = matrix * half[None, None, :] / half[None, :, None]  # pixels -> [-1, 1] on both sides
    grid = functional.affine_grid(theta[:, :2], [n, 1, height, width], align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _color(draws: Tensor, p: float, transforms: Collection[str], channels: int) -> tuple[Tensor, Tensor]:
    """The matrix (N, C, C) and offset (N, C, 1) of each image's colors.

    The luma axis is (1, ..., 1) / sqrt(C), as in the paper for C = 3.
    """
    u = _Draws(draws[:, 18:])
    identity = torch.eye(channels, dtype=torch.float64)
    grey = torch.full((channels, channels), 1 / channels, dtype=torch.float64)  # v v^T
    matrix, offset = identity.repeat(len(draws), 1, 1), torch.zeros(len(draws), channels, 1, dtype=torch.float64)

    def chosen(name: str, make: Callable[[Tensor], Tensor]) -> Tensor:
        """(N, C, C): the transform where it was drawn, the identity elsewhere."""
        gate = u.gate(p, name in transforms)
        return torch.where(gate[:, None, None], make(u.uniform()[:, None, None]), identity)

    gate, brightness = u.gate(p, "brightness" in transforms), BRIGHTNESS_SD * u.normal()
    offset = offset + (gate * brightness)[:, None, None]
    for step in (chosen("contrast", lambda v: torch.exp2(CONTRAST_SD * torch.special.ndtri(v)) * identity),
                 chosen("luma_flip", lambda v: identity - 2 * grey * (v < 0.5)),
                 chosen("hue", lambda v: _around_luma(math.pi * (2 * v - 1)) if channels == 3 else identity),
                 chosen("saturation", lambda v: grey + (identity - grey) * torch.exp2(SATURATION_SD * torch.special.ndtri(v))
                        if channels > 1 else identity)):
        matrix, offset = step @ matrix, step @ offset
    return matrix, offset


def _around_luma(angle: Tensor) -> Tensor:
    """(N, 1, 1) -> (N, 3, 3): rotation around (1, 1, 1) / sqrt(3) (Rodrigues)."""
    axis = 1 / math.sqrt(3)
    cross = torch.tensor([[0, -axis, axis], [axis, 0, -axis], [-axis, axis, 0]], dtype=torch.float64)
    return torch.eye(3, dtype=torch.float64) + angle.sin() * cross + (1 - angle.cos()) * (cross @ cross)
