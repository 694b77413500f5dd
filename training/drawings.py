"""Sequences for people: strokes and text as pictures, characters as text."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data_shards.errors import UserError

STROKE_SCALE = 4  # strokes are drawn so many times larger than they are shown, for smooth edges
LETTER = (6, 11)  # pixels of Pillow's built-in bitmap font, in which every letter is as wide


def draw_strokes(samples: Tensor, grid: int) -> Tensor:
    """Pen movements uint8 (N, 3, 1, T), steps (pen, x, y) as `data_shards.datasets.kanjivg_strokes` has them, as white lines on
    black, uint8 (N, 1, grid, grid)."""
    return torch.stack([_drawn(steps, grid) for steps in samples[:, :, 0].mT.tolist()])


def _drawn(steps: list[list[int]], grid: int) -> Tensor:
    scale = STROKE_SCALE
    sheet = Image.new("L", (grid * scale, grid * scale))
    pencil, strokes = ImageDraw.Draw(sheet), list[list[tuple[float, float]]]()
    for pen, x, y in steps:
        if pen == 0:
            break
        if pen == 1 or not strokes:
            strokes.append([])
        strokes[-1].append(((x + 0.5) * scale, (y + 0.5) * scale))
    for stroke in strokes:
        pencil.line(stroke if len(stroke) > 1 else stroke * 2, fill=255, width=round(1.5 * scale), joint="curve")
    return torch.from_numpy(np.asarray(sheet.resize((grid, grid), Image.Resampling.BOX)).copy())[None]


def to_lines(samples: Tensor, alphabet: str) -> list[str]:
    """Characters uint8 (N, 1, 1, T), b for the b-th of ``alphabet`` and 0 for the end, as text.

    Raises:
        UserError: for a number beyond the alphabet.
    """
    if (largest := int(samples.max())) > len(alphabet):
        raise UserError(f"the samples have the character number {largest}, and training.sequence.alphabet has {len(alphabet)}; "
                        "give the alphabet that the set was made with.")
    lines = []
    for numbers in samples[:, 0, 0].tolist():
        end = numbers.index(0) if 0 in numbers else len(numbers)
        lines.append("".join(alphabet[number - 1] for number in numbers[:end]))
    return lines


def draw_text(lines: list[str]) -> Tensor:
    """Lines of text as pictures of one size, white on black, uint8 (N, 1, height, width)."""
    font, (width, height) = ImageFont.load_default_imagefont(), LETTER
    longest = max(1, *map(len, lines))
    pictures = []
    for line in lines:
        sheet = Image.new("L", (longest * width + 4, height + 4))
        ImageDraw.Draw(sheet).text((2, 2), line.encode("latin-1", "replace").decode("latin-1"), fill=255, font=font)
        pictures.append(torch.from_numpy(np.asarray(sheet).copy())[None])
    return torch.stack(pictures)
