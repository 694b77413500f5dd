"""Exponential moving average of weights, with a half-life in images (Karras et al. 2024, edm2's traditional EMA)."""

from __future__ import annotations

import copy

import torch
from torch import nn


def make_average(module: nn.Module) -> nn.Module:
    """A copy of ``module`` that no gradient reaches."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, *, batch: int, halflife_images: float) -> None:
    """One step: average <- average + (1 - 0.5^(batch / half-life)) (module - average); a half-life of 0 copies."""
    weight = 1.0 - 0.5 ** (batch / halflife_images) if halflife_images > 0 else 1.0
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), weight)
