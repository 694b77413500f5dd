"""Small networks for points in the plane, many independent copies side by side: weights are (copies, inside, outside), layers
one batched product. A copy's draws do not depend on the others.

Under bf16 autocast only the products between hidden layers are bf16: coordinates must keep their precision, a mode's spread is
1 % of its distance from the origin.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from training.draws import generator


def _weights(seeds: Sequence[int], purpose: str, inside: int, outside: int, std: float) -> nn.Parameter:
    return nn.Parameter(torch.stack([torch.randn(inside, outside, generator=generator(seed, purpose, 0)) * std
                                     for seed in seeds]))


def _affine(x: Tensor, weight: Tensor, bias: Tensor, exact: bool) -> Tensor:
    """x W + b for each copy; ``exact``: in fp32 whatever the autocast."""
    if not exact:
        return torch.baddbmm(bias, x, weight)
    with torch.autocast(x.device.type, enabled=False):
        return torch.baddbmm(bias, x.float(), weight)


class Generator(nn.Module):
    """z (copies, N, 2) -> points (copies, N, 2): four hidden layers of ``hidden`` rectified units.

    ``batch_norm``: PacGAN's own: batch normalisation over each copy's N, no biases, N(0, 0.02^2) weights. Without it: He's
    initialisation, and biases that are drawn too, so that the kinks do not all meet in the origin.
    """

    def __init__(self, seeds: Sequence[int], *, hidden: int = 400, batch_norm: bool = False) -> None:
        super().__init__()
        widths = [2, hidden, hidden, hidden, hidden, 2]
        self.batch_norm = batch_norm
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        self.shifts, self.scales = nn.ParameterList(), nn.ParameterList()
        for i, (inside, outside) in enumerate(itertools.pairwise(widths)):
            std = 0.02 if batch_norm else math.sqrt(2 / inside)
            self.weights.append(_weights(seeds, f"generator {i}", inside, outside, std))
            spread = 0.0 if batch_norm or outside == 2 else 0.5
            self.biases.append(_weights(seeds, f"generator bias {i}", 1, outside, spread))
            self.biases[-1].requires_grad_(not batch_norm or outside == 2)
            if batch_norm and outside == hidden:
                self.shifts.append(nn.Parameter(torch.zeros(len(seeds), 1, outside)))
                self.scales.append(nn.Parameter(torch.ones(len(seeds), 1, outside)))

    def forward(self, z: Tensor) -> Tensor:
        x = z
        for i in range(len(self.weights) - 1):
            x = _affine(x, self.weights[i], self.biases[i], exact=i == 0)
            if self.batch_norm:
                variance, mean = torch.var_mean(x.float(), dim=1, keepdim=True, correction=0)
                x = relu((x - mean) * ((variance + 1e-4).rsqrt() * self.scales[i]) + self.shifts[i])
            else:
                x = relu(x)
        return _affine(x, self.weights[-1], self.biases[-1], exact=True)


class Discriminator(nn.Module):
    """points (copies, N, inside) -> logits (copies, N): three maxout layers of ``hidden`` units of ``pieces`` (PacGAN's).

    ``std``: of the weights, with biases of 0 (PacGAN's 0.02); None: 1 / sqrt(inputs), and biases drawn as in `Generator`.
    """

    def __init__(self, seeds: Sequence[int], *, inside: int = 2, hidden: int = 200, pieces: int = 5, std: float | None = 0.02,
                 ) -> None:
        super().__init__()
        self.pieces = pieces
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, (width, units) in enumerate([(inside, hidden), (hidden, hidden), (hidden, hidden)]):
            self.weights.append(_weights(seeds, f"discriminator {i}", width, units * pieces,
                                         std or math.sqrt(1 / width)))
            self.biases.append(_weights(seeds, f"discriminator bias {i}", 1, units * pieces, 0.0 if std else 1.0))
        self.head = _weights(seeds, "discriminator head", hidden, 1, std or math.sqrt(1 / hidden))

    def forward(self, points: Tensor) -> Tensor:
        x = points
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = _affine(x, weight, bias, exact=i == 0).unflatten(-1, (self.pieces, -1)).max(-2).values
        with torch.autocast(x.device.type, enabled=False):
            return torch.bmm(x.float(), self.head).squeeze(-1)
