"""Exponential moving average of weights, with a half-life in images (Karras et al. 2024, edm2's traditional EMA)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from training.engines import Engine, completed

Average = list[Tensor]
"""The average of this rank's share of the float32 weights (`Engine.masters`), so that it costs what sharding leaves of them."""


def make_average(engine: Engine, weights: Mapping[str, Tensor] | None = None) -> Average:
    """An average that begins at the network's weights, or at those of a checkpoint."""
    return engine.share(weights) if weights else [master.detach().clone() for master in engine.masters()]


@torch.no_grad()
def update_average(average: Average, engine: Engine, *, batch: int, halflife_images: float) -> None:
    """One step: average <- average + (1 - 0.5^(batch / half-life)) (weights - average); a half-life of 0 copies."""
    weight = 1.0 - 0.5 ** (batch / halflife_images) if halflife_images > 0 else 1.0
    torch._foreach_lerp_(average, [master.detach() for master in engine.masters()], weight)


def whole_average(average: Average, engine: Engine, to: int | None = None) -> dict[str, Tensor]:
    """The averaged network's state dict, whole, on the CPU, on rank ``to`` or on all. A collective.

    Buffers, and weights that are not trained, are the network's own."""
    return completed(engine, engine.gather(average, to), to)
