"""Corrupted data, to see how much of a gain is owed to clean images: a share of them gets noise, a blot, or a wrong label.

Which images are corrupted, and how, is a pure function of (seed, image): a larger share corrupts those of a smaller one, and
more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from data_shards import Batch
from training.config import Config
from training.draws import generator

NOISE = 64.0  # standard deviation on the scale of 0..255


class Corruption(Config):
    kind: Literal["noise", "occlusion", "mislabelled"] = Field(
        description="noise: normal, its deviation a quarter of the range of values; occlusion: a square of half the side, of "
                    "one random grey; mislabelled: a wrong class in the source, an image of the source in a support pool")
    share: float = Field(ge=0, le=1, description="share of the images that is corrupted")


def corrupted_rows(count: int, corruption: Corruption, seed: int, purpose: str) -> Tensor:
    """Which of ``count`` images are corrupted, int64: round(share * count) of them, in one order for all shares."""
    order = torch.randperm(count, generator=generator(seed, f"{purpose} {corruption.kind}", 0))
    return order[:round(corruption.share * count)]


def spoil(image: Tensor, kind: str, draw: torch.Generator) -> Tensor:
    """An image uint8 (C, H, W) with noise, or with a blot."""
    if kind == "noise":
        return (image + torch.randn(image.shape, generator=draw) * NOISE).round().clamp(0, 255).to(torch.uint8)
    assert kind == "occlusion"
    blotted, (height, width) = image.clone(), image.shape[1:]
    top, left = (int(torch.randint(0, side - side // 2 + 1, (), generator=draw)) for side in (height, width))
    grey = torch.randint(0, 256, (), generator=draw).to(torch.uint8)
    blotted[:, top:top + height // 2, left:left + width // 2] = grey
    return blotted


def corrupt_pool(images: Tensor, corruption: Corruption, seed: int, purpose: str, strangers: Tensor) -> Tensor:
    """Images uint8 (N, C, H, W) of a support pool, a share of them corrupted.

    Args:
        purpose: tells one part of the pool from another.
        strangers: images uint8 (M, C, H, W) that do not belong to the domain, for ``mislabelled``; the i-th takes the place of
            the i-th image that is corrupted, from the start again where they are too few.
    """
    spoiled = images.clone()
    for number, row in enumerate(corrupted_rows(len(images), corruption, seed, purpose).tolist()):
        if corruption.kind == "mislabelled":
            spoiled[row] = strangers[number % len(strangers)]
        else:
            spoiled[row] = spoil(images[row], corruption.kind, generator(seed, f"{purpose} {corruption.kind} {row}", 1))
    return spoiled


def corrupt_source(feed: Iterator[Batch], corruption: Corruption | None, seed: int, classes: int) -> Iterator[Batch]:
    """The source's batches with a share of its images corrupted, each the same way at every visit and on every rank.

    A wrong class is any of the ``classes`` but the right one.
    """
    if corruption is None or not corruption.share:
        yield from feed
        return
    for batch in feed:
        images, labels = batch.images.clone(), batch.labels.clone()
        for row, name in enumerate(batch.names.tolist()):
            digest = hashlib.sha256(f"{seed}/{corruption.kind}/".encode() + name).digest()
            if int.from_bytes(digest[:8], "little") / 2**64 >= corruption.share:
                continue
            draw = torch.Generator().manual_seed(int.from_bytes(digest[8:16], "little") >> 1)
            if corruption.kind == "mislabelled":
                labels[row] = (labels[row] + torch.randint(1, classes, (), generator=draw)) % classes
            else:
                images[row] = spoil(images[row], corruption.kind, draw)
        yield replace(batch, images=images, labels=labels)
