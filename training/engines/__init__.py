"""Engines step one network; both makers give the same numbers and the same optimizer state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

from torch import Tensor, nn

from training.config import Config, operational
from training.engines.torch import TorchEngine
from training.optimizers import OptimizerConfig
from training.world import World

OptimizerState = Mapping[str, Tensor]
"""``"<parameter>/<slot>"`` -> float32 tensor: whole parameters' moments, and ``"<slot>"`` -> a scalar such as Adam's step."""


class EngineConfig(Config):
    kind: Literal["deepspeed", "torch"] = operational("deepspeed", "who steps the networks; both give the same numbers")
    zero: Literal[0, 1, 2] = operational(2, "DeepSpeed's ZeRO stage of both engines")


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
