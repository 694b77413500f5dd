"""The plain engine: weights and gradients of a network in one flat buffer each, torch's optimizer over it, and one all-reduce
per step (no DDP: its hooks and double backward do not mix)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.engines.flat import cut, gather_state, join, lay_out, share_state
from training.optimizers import OptimizerConfig, clip_scale, make_optimizer
from training.world import World, device

if TYPE_CHECKING:
    from training.engines import OptimizerState

ALIGN = 16  # floats: 64 bytes, as an allocation of its own would have
GROWTH_STEPS = 2000  # of finite gradients, after which the scale of an fp16 loss is doubled


class TorchEngine:
    def __init__(self, module: nn.Module, optimizer: OptimizerConfig, world: World, *, accumulation: int = 1,
                 scales: bool = False, state: OptimizerState | None = None) -> None:
        self.module = module
        self.world = world
        self.accumulation = accumulation
        self.clip = optimizer.clip
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.slots, self.length = lay_out(named, align=ALIGN)
        place = next((parameter.device for parameter in named.values()), device())  # a fitted network trains nothing
        self.flat = nn.Parameter(join({name: p.detach() for name, p in named.items()}, self.slots, self.length).to(place))
        self.flat.grad = torch.zeros_like(self.flat)
        for parameter, values, gradient in zip(named.values(), cut(self.flat.detach(), self.slots).values(),
                                               cut(self.flat.grad, self.slots).values(), strict=True):
            parameter.data = values
            parameter.grad = gradient  # backward adds into it
        self.optimizer = make_optimizer([self.flat], optimizer)
        # fp16 gradients underflow: the loss is scaled by this, and it is halved when they overflow (Micikevicius et al. 2018).
        self.scale = torch.tensor(2.0**16 if scales else 1.0, device=place)
        self.good_steps = torch.tensor(0.0, device=place) if scales else None
        if state:
            moments = dict(state)
            for name in ("scale", "good_steps"):
                if f"loss_{name}" in moments:
                    setattr(self, name, moments.pop(f"loss_{name}").to(place))
            self.optimizer.state[self.flat] = share_state(moments, self)[0]

    def backward(self, loss: Tensor) -> None:
        if self.accumulation > 1 or self.good_steps is not None:
            loss = loss * (self.scale / self.accumulation)
        loss.backward()

    def step(self, lr: float) -> Tensor:
        gradient = self.flat.grad
        assert gradient is not None
        if self.world.size > 1:
            dist.all_reduce(gradient)
            gradient /= self.world.size
        if self.good_steps is not None:
            gradient /= self.scale
        norm = torch.linalg.vector_norm(gradient)
        if self.clip:
            gradient *= clip_scale(norm, self.clip)
        # Decided on the device, so that it is not waited for: a step of a non-finite gradient is left out.
        broken = (~torch.isfinite(norm)).float()
        self.optimizer.found_inf = broken  # type: ignore[attr-defined]  # read by fused optimizers
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        gradient.zero_()
        if self.good_steps is not None:
            self.good_steps = (self.good_steps + 1) * (1 - broken)
            grown = (self.good_steps >= GROWTH_STEPS).float()
            self.scale = self.scale * torch.where(broken > 0, 0.5, 1 + grown)
            self.good_steps = self.good_steps * (1 - grown)
        return norm

    def masters(self) -> list[Tensor]:
        return [self.flat.detach()]

    def gather(self, shares: Sequence[Tensor], to: int | None = None) -> dict[str, Tensor]:
        if to not in (None, self.world.rank):
            return {}
        return {name: values.detach().float().cpu().clone() for name, values in cut(shares[0], self.slots).items()}

    def share(self, named: Mapping[str, Tensor]) -> list[Tensor]:
        return [join(named, self.slots, self.length).to(self.flat.device)]

    def optimizer_state(self, to: int | None = None) -> dict[str, Tensor]:
        found = gather_state([self.optimizer.state[self.flat]], self, to)
        if self.good_steps is not None:
            found |= {"loss_scale": self.scale.cpu(), "loss_good_steps": self.good_steps.cpu()}
        return found

    def close(self) -> None:
        """The network's gradients no longer lie in the engine's buffer."""
        for parameter in self.module.parameters():
            parameter.grad = None
