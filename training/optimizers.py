"""Optimizers by name; each means what its name says (DeepSpeed's own "Adam" is AdamW, so it is never asked for one)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from training.recipe import OptimizerConfig

Parameters = Iterable[torch.nn.Parameter]


def _adam(parameters: Parameters, config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.0, betas=config.betas, eps=config.eps,
                            weight_decay=config.weight_decay, fused=True)


def _adamw(parameters: Parameters, config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.0, betas=config.betas, eps=config.eps,
                             weight_decay=config.weight_decay, fused=True)


def _sgd(parameters: Parameters, config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0, momentum=config.betas[0], weight_decay=config.weight_decay, fused=True)


OPTIMIZERS: dict[str, Callable[[Parameters, OptimizerConfig], torch.optim.Optimizer]] = {
    "adam": _adam, "adamw": _adamw, "sgd": _sgd,
}


def make_optimizer(parameters: Parameters, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer over ``parameters``; its learning rate is 0 until a step sets it from the schedule."""
    return OPTIMIZERS[config.name](parameters, config)
