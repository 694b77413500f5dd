"""Grids of images as PNG files."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from training.world import device


def to_uint8(images: Tensor) -> Tensor:
    """float [-1, 1] -> uint8 on the CPU."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


@torch.no_grad()
def generate(generator: nn.Module, z: Tensor, labels: Tensor | None = None, batch: int = 250, **settings: float) -> Tensor:
    """Images uint8 (N, C, H, W) of the latents z (N, latent_dim), in evaluation mode.

    ``labels`` (N,) are the classes that a conditional generator is told; by default all in turn. ``settings`` go to its
    forward pass.
    """
    target, training = device(), generator.training
    labels = in_turn(generator, len(z)) if labels is None else labels
    generator.eval()
    try:
        given = (z,) if labels is None else (z, labels)
        return torch.cat([to_uint8(generator(*(each[start:start + batch].to(target) for each in given), **settings))
                          for start in range(0, len(z), batch)])
    finally:
        generator.train(training)


def in_turn(generator: nn.Module, count: int) -> Tensor | None:
    """All classes that a generator is told, one after the other, (count,); None where it is told none."""
    classes = getattr(generator, "classes", 0)
    return torch.arange(count) % classes if classes else None


def translate(translator: nn.Module, images: Tensor, batch: int = 250) -> Tensor:
    """uint8 images (N, C, H, W) as uint8 images of the other domain, in evaluation mode."""
    return generate(translator, images.float() / 127.5 - 1.0, batch=batch)


def above_and_below(above: Tensor, below: Tensor, columns: int = 8) -> Tensor:
    """uint8 images in the order of a grid of ``columns``: a row of ``above``, under it theirs of ``below``, and so on; the last
    two rows are filled up in gray."""
    rows = []
    for pair in zip(above.split(columns), below.split(columns), strict=True):
        for row in pair:
            rows += [row, torch.full((columns - len(row), *row.shape[1:]), 128, dtype=torch.uint8)]
    return torch.cat(rows)


def save_grid(images: Tensor, path: Path, columns: int = 8, gap: int = 1) -> None:
    """Write `grid_png` to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(grid_png(images, columns, gap))


def grid_png(images: Tensor, columns: int = 8, gap: int = 1) -> bytes:
    """uint8 images (N, C, H, W), C = 1 or 3, row by row as one PNG at native resolution."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.full((channels, rows * (height + gap) - gap, columns * (width + gap) - gap), 128, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[:, top:top + height, left:left + width] = image
    array = sheet.permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(array[..., 0] if channels == 1 else array).save(file, format="PNG")
    return file.getvalue()
