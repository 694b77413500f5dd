"""Random numbers that are a pure function of a sample's latent: no generator state, the same on every rank and in every split
of a batch, and drawn anew when z changes in any bit. A counter-based generator: z is hashed to a key, and (key, stream,
counter) to bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def uniform(z: Tensor, stream: int, count: int) -> Tensor:
    """(N, D) -> (N, count) float32 in (0, 1), independent of each other and between streams."""
    bits = z.detach().float().contiguous().view(torch.int32).long() & MASK
    places = _mix(torch.arange(1, z.shape[1] + 1, device=z.device)) | 1
    key = _mix((_mix(bits) * places).sum(1) ^ _mix(torch.tensor(stream + 1, device=z.device)))
    numbers = _mix(key[:, None] ^ _mix(torch.arange(count, device=z.device) + 0x9E3779B9))
    return (numbers.double() + 0.5).div(MASK + 1).float().clamp(max=1 - 2**-24)


def normal(z: Tensor, stream: int, count: int) -> Tensor:
    """(N, D) -> (N, count) numbers of N(0, 1), by Box and Muller's transform."""
    pairs = uniform(z, stream, 2 * count)
    radius, angle = pairs[:, :count], pairs[:, count:]
    return (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers (in int64); each bit of x changes about half of the result's (multiply and xor-shift)."""
    x = x & MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)
