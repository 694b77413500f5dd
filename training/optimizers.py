"""Optimizers by name; each means what its name says (DeepSpeed's own "Adam" is AdamW, so it is never asked for one)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from pydantic import Field, field_validator
from torch import Tensor

from training.config import Config, one_of
from training.schedule import Schedule, check_schedule

Parameters = Iterable[torch.nn.Parameter]


class OptimizerConfig(Config):
    name: str = Field("adam", description="optimizer: adam, adamw or sgd")
    lr: Schedule = Field(2e-4, description="learning rate; a number or [[images, value], ...]")
    betas: tuple[float, float] = Field((0.0, 0.99), description="decay rates of Adam's moments, or (momentum, unused)")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    weight_decay: float = Field(0.0, ge=0, description="weight lambda of lambda/2 |w|^2 in the loss (adam, sgd), or AdamW's "
                                                        "decoupled decay")
    l1: float = Field(0.0, ge=0, description="weight of |w|_1 in the loss; like weight_decay it is added after clipping")
    clip: float = Field(0.0, ge=0, description="largest norm of the network's gradient; longer ones are scaled to it; 0: any")
    every: int = Field(1, ge=1, description="steps of training, a batch each, between two of this network; 5 for the generator "
                                            "gives five discriminator steps to one of the generator")

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
    optimizer = OPTIMIZERS[config.name](parameters, config)
    if config.l1:
        optimizer.register_step_pre_hook(lambda stepped, *_: _add_l1(stepped, config.l1))
    return optimizer


@torch.no_grad()
def _add_l1(optimizer: torch.optim.Optimizer, weight: float) -> None:
    """The gradient of ``weight`` |w|_1: elementwise, so that it is right on any share of the weights."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.add_(parameter.sign(), alpha=weight)


def clip_scale(norm: Tensor, largest: float) -> Tensor:
    """What a gradient of this norm is multiplied by to have at most the norm ``largest`` (torch's and DeepSpeed's formula)."""
    return (largest / (norm + 1e-6)).clamp(max=1.0)
