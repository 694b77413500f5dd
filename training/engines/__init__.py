"""Engines step one network; both makers give the same numbers and the same optimizer state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from training.engines.torch import TorchEngine
from training.world import World

if TYPE_CHECKING:
    from training.recipe import EngineConfig, OptimizerConfig

OptimizerState = Mapping[str, Tensor]
"""``"<parameter>/<slot>"`` -> float32 tensor: whole parameters' moments, and ``"<slot>"`` -> a scalar such as Adam's step."""


class Engine(Protocol):
    """A network with its optimizer over all ranks. Forward passes go through ``module``."""

    module: nn.Module

    def backward(self, loss: Tensor) -> None:
        """Gradients of one scalar. Call it once before each `step`: ZeRO 1 and 2 forget an earlier call's gradient."""

    def step(self, lr: float) -> None:
        """Average the gradients over the ranks, update the weights, clear the gradients."""

    def optimizer_state(self) -> dict[str, Tensor]:
        """The whole optimizer state on every rank, free of world size and stage. A collective."""

    def close(self) -> None:
        """Release what the engine holds."""


def make_engine(module: nn.Module, optimizer: OptimizerConfig, engine: EngineConfig, world: World, *,
                batch: int, state: OptimizerState | None = None) -> Engine:
    """The engine ``engine.kind`` around ``module``, whose weights must be the same on every rank.

    Args:
        batch: this rank's images per step.
        state: optimizer state of a checkpoint, at any world size and stage.
    """
    if engine.kind == "torch":
        return TorchEngine(module, optimizer, world, state)
    from training.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(module, optimizer, world, zero=engine.zero, batch=batch, state=state)
