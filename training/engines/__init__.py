"""Engines step one network; both makers give the same numbers and the same optimizer state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from torch import Tensor, nn

from training.config import Config, operational
from training.engines.torch import TorchEngine
from training.optimizers import OptimizerConfig
from training.world import World

OptimizerState = Mapping[str, Tensor]
"""``"<parameter>/<slot>"`` -> float32 tensor: whole parameters' moments, and ``"<slot>"`` -> a scalar such as Adam's step."""
Zero = Literal[0, 1, 2, 3]


class EngineConfig(Config):
    kind: Literal["deepspeed", "torch"] = operational("deepspeed", "who steps the networks; both give the same numbers")
    zero: Zero | dict[str, Zero] = operational(
        2, "DeepSpeed's ZeRO stage, of all networks or by name ({generator: 3, discriminator: 1}): what each rank holds only "
           "its share of; 1 the optimizer's state, 2 also the gradients, 3 also the weights")
    offload_optimizer: bool = operational(False, "keep the optimizer's state in the CPU's memory and step there")
    offload_parameters: bool = operational(False, "ZeRO 3: keep each rank's share of the weights in the CPU's memory")
    persistence_threshold: int = operational(100_000, "ZeRO 3: weights of fewer values are kept whole on every rank", ge=0)
    accumulation: int = operational(1, "micro-batches of a step, one after another; each needs memory for its share only", ge=1)

    def stage(self, network: str) -> Zero:
        """The ZeRO stage of a network; the plain engine shards nothing."""
        if self.kind == "torch":
            return 0
        return self.zero.get(network, 2) if isinstance(self.zero, dict) else self.zero


class Engine(Protocol):
    """A network with its optimizer over all ranks. Forward passes go through ``module``.

    The float32 weights that the optimizer steps are its masters: all of them on every rank, or each rank's share of them.
    """

    module: nn.Module
    world: World

    def backward(self, loss: Tensor) -> None:
        """Gradients of one scalar. Call it once for each of the step's micro-batches: ZeRO 1 and 2 forget what more add."""

    def step(self, lr: float) -> Tensor:
        """Average the gradients over micro-batches and ranks, update the weights, clear the gradients.

        Returns:
            The gradient's norm over the whole network before clipping, the same on every rank; a step whose norm is not finite
            has changed nothing.
        """

    def masters(self) -> list[Tensor]:
        """This rank's share of the float32 weights, to be read only."""

    def gather(self, shares: Sequence[Tensor], to: int | None = None) -> dict[str, Tensor]:
        """Tensors shaped like the masters (an average, a moment), whole and by parameter, in float32 on the CPU.

        A collective; the rank ``to`` gets them, or all, the others an empty dict."""

    def share(self, named: Mapping[str, Tensor]) -> list[Tensor]:
        """The reverse of `gather`: this rank's share of whole tensors by parameter."""

    def optimizer_state(self, to: int | None = None) -> dict[str, Tensor]:
        """The whole optimizer state on every rank, or on rank ``to``, free of world size and stage. A collective."""

    def close(self) -> None:
        """Release what the engine holds."""


def make_engine(name: str, module: nn.Module, optimizer: OptimizerConfig, engine: EngineConfig, world: World, *,
                batch: int, state: OptimizerState | None = None) -> Engine:
    """The engine ``engine.kind`` around the network ``name``, whose weights must be the same on every rank.

    Args:
        batch: this rank's images per step.
        state: optimizer state of a checkpoint, at any world size and stage.
    """
    if engine.kind == "torch":
        return TorchEngine(module, optimizer, world, accumulation=engine.accumulation, state=state)
    from training.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(module, optimizer, world, engine, zero=engine.stage(name),
                           batch=batch // engine.accumulation, state=state)


def whole_weights(engine: Engine, to: int | None = None) -> dict[str, Tensor]:
    """The network's state dict, whole, on the CPU: float32 weights and buffers. A collective."""
    weights = engine.gather(engine.masters(), to)
    if to in (None, engine.world.rank):
        weights |= {name: value.detach().cpu().clone() for name, value in engine.module.state_dict().items()
                    if name not in weights}
    return weights
