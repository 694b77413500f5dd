"""The plain engine: torch's optimizer, and one all-reduce of one flat buffer per step (no DDP: its hooks and double backward
do not mix)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.optimizers import OptimizerConfig, make_optimizer
from training.world import World

if TYPE_CHECKING:
    from training.engines import OptimizerState


class TorchEngine:
    def __init__(self, module: nn.Module, optimizer: OptimizerConfig, world: World,
                 state: OptimizerState | None = None) -> None:
        self.module = module
        self.world = world
        self.named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(self.named.values(), optimizer)
        if state:
            write_state(self.optimizer, self.named, state)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> None:
        if self.world.size > 1:
            gradients = [p.grad for p in self.named.values() if p.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            flat /= self.world.size
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()

    def optimizer_state(self) -> dict[str, Tensor]:
        return read_state(self.optimizer, self.named)

    def close(self) -> None:
        pass


def read_state(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The state of an unsharded optimizer by parameter name."""
    state: dict[str, Tensor] = {}
    for name, parameter in named.items():
        for slot, value in optimizer.state[parameter].items():
            if value is None:
                continue
            if value.shape == parameter.shape and value.dim() > 0:
                state[f"{name}/{slot}"] = value.detach().float().cpu().clone()
            else:
                state[slot] = torch.as_tensor(value).float().cpu().clone()
    return state


def write_state(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], state: OptimizerState) -> None:
    """The reverse of `read_state`, for the parameters in ``named``."""
    scalars = {key: value for key, value in state.items() if "/" not in key}
    for name, parameter in named.items():
        slots = {key.removeprefix(f"{name}/"): value.to(parameter.device, copy=True)
                 for key, value in state.items() if key.startswith(f"{name}/")}
        optimizer.state[parameter] = slots | {key: value.clone() for key, value in scalars.items()}
