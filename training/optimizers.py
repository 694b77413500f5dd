"""Optimizers by name; each means what its name says (DeepSpeed's own "Adam" is AdamW, so it is never asked for one)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from pydantic import Field, field_validator

from training.config import Config, one_of
from training.schedule import Schedule, check_schedule

Parameters = Iterable[torch.nn.Parameter]


class OptimizerConfig(Config):
    name: str = Field("adam", description="optimizer: adam, adamw or sgd")
    lr: Schedule = Field(2e-4, description="learning rate; a number or [[images, value], ...]")
    betas: tuple[float, float] = Field((0.0, 0.99), description="decay rates of Adam's moments, or (momentum, unused)")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled decay, or L2 in Adam and SGD")

    _known = field_validator("name")(one_of(lambda: OPTIMIZERS, "optimizer"))
    _lr = field_validator("lr")(check_schedule)


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
