"""Where each named parameter lies in one flat tensor, and optimizer state by parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from training.engines import Engine, OptimizerState


@dataclass(frozen=True)
class Slot:
    """A parameter's place: ``numel`` values from ``start`` on."""

    name: str
    shape: torch.Size
    start: int
    numel: int


def lay_out(named: Mapping[str, nn.Parameter], *, align: int = 1) -> tuple[list[Slot], int]:
    """Places of the parameters one after another, each begun at a multiple of ``align`` values; and the length of them all."""
    slots, end = [], 0
    for name, parameter in named.items():
        start = -(-end // align) * align
        slots.append(Slot(name, parameter.shape, start, parameter.numel()))
        end = start + parameter.numel()
    return slots, end


def cut(flat: Tensor, slots: Iterable[Slot]) -> dict[str, Tensor]:
    """Views of the parameters' values in ``flat``."""
    return {slot.name: flat[slot.start:slot.start + slot.numel].view(slot.shape) for slot in slots}


def join(named: Mapping[str, Tensor], slots: Iterable[Slot], length: int) -> Tensor:
    """The reverse of `cut`, on the CPU in float32; what no parameter fills is 0."""
    flat = torch.zeros(length)
    for slot in slots:
        flat[slot.start:slot.start + slot.numel] = named[slot.name].flatten()
    return flat


def gather_state(states: Sequence[Mapping[str, Tensor]], engine: Engine, to: int | None) -> dict[str, Tensor]:
    """The optimizer's state by parameter, from its ``states`` of the engine's masters, one each. A collective."""
    found: dict[str, Tensor] = {}
    for slot in sorted(states[0]):
        values = [state[slot] for state in states]
        if values[0].dim() == 0:
            found[slot] = values[0].detach().float().cpu().clone()
        else:
            found |= {f"{name}/{slot}": value for name, value in engine.gather(values, to).items()}
    return found


def share_state(state: OptimizerState, engine: Engine) -> list[dict[str, Tensor]]:
    """The reverse of `gather_state`: the optimizer's state of each of the engine's masters."""
    scalars = {key: value for key, value in state.items() if "/" not in key}
    found: list[dict[str, Tensor]] = [{key: value.clone() for key, value in scalars.items()} for _ in engine.masters()]
    for slot in {key.rpartition("/")[2] for key in state if "/" in key}:
        named = {key.rpartition("/")[0]: value for key, value in state.items() if key.endswith(f"/{slot}")}
        for mine, share in zip(found, engine.share(named), strict=True):
            mine[slot] = share
    return found
