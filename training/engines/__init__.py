"""Engines step one network; both makers give the same numbers and the same optimizer state."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from pydantic import model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data_shards.errors import UserError
from training.config import Config, operational
from training.engines.torch import TorchEngine
from training.optimizers import OptimizerConfig
from training.world import World

OptimizerState = Mapping[str, Tensor]
"""``"<parameter>/<slot>"`` -> float32 tensor: whole parameters' moments, and ``"<slot>"`` -> a scalar such as Adam's step."""
Zero = Literal[0, 1, 2, 3]


class EngineConfig(Config):
    kind: Literal["auto", "deepspeed", "torch"] = operational(
        "auto", "who steps the networks, to the same numbers; auto: torch alone in one process that offloads nothing, where "
                "there is nothing to share, else deepspeed")
    zero: Zero | dict[str, Zero] = operational(
        2, "DeepSpeed's ZeRO stage, of all networks or by name ({generator: 3, discriminator: 1}): what each rank holds only "
           "its share of; 1 the optimizer's state, 2 also the gradients, 3 also the weights; a network not named has 2")
    offload_optimizer: bool = operational(False, "keep the optimizer's state in the CPU's memory and step there")
    offload_parameters: bool = operational(False, "ZeRO 3: keep each rank's share of the weights in the CPU's memory")
    persistence_threshold: int = operational(100_000, "ZeRO 3: weights of fewer values are kept whole on every rank", ge=0)
    checkpoint_activations: bool = operational(
        False, "keep only what goes into each block of a network, and compute the rest again in the backward pass")
    compile: tuple[str, ...] = operational(
        (), "networks that torch.compile compiles; not one whose penalties are by double backward")
    accumulation: int = operational(1, "micro-batches of a step, one after another; each needs memory for its share only", ge=1)

    @model_validator(mode="after")
    def _possible(self) -> EngineConfig:
        stages = self.zero.values() if isinstance(self.zero, dict) else [self.zero]
        if self.kind == "torch" and (self.offload_optimizer or self.offload_parameters):
            raise ValueError("the plain engine offloads nothing; use kind deepspeed")
        if self.offload_optimizer and 0 in stages:
            raise ValueError("ZeRO 0 has no share of the optimizer's state to offload; use zero 1, 2 or 3")
        if self.offload_parameters and 3 not in stages:
            raise ValueError("only ZeRO 3 has shares of the weights to offload; use zero 3")
        return self

    def stage(self, network: str) -> Zero:
        """The ZeRO stage of a network under DeepSpeed; the plain engine shards nothing."""
        if self.kind == "torch":
            return 0
        return self.zero.get(network, 2) if isinstance(self.zero, dict) else self.zero

    def plain(self, world: World, precision: str) -> bool:
        """Whether the plain engine is the one to use: fp16 is its only, and masters of bf16 weights are DeepSpeed's."""
        if self.kind != "auto" or precision in ("fp16", "bf16_weights"):
            return self.kind == "torch" or precision == "fp16"
        return world.size == 1 and not (self.offload_optimizer or self.offload_parameters)

    def said(self, world: World, precision: str) -> str:
        """Who steps the networks in such a world, in words."""
        if self.plain(world, precision):
            return "plain engine"
        if isinstance(self.zero, dict):
            return "DeepSpeed ZeRO " + ", ".join(f"{stage} ({name})" for name, stage in self.zero.items())
        return f"DeepSpeed ZeRO {self.zero}"


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
                batch: int, precision: str = "fp32", state: OptimizerState | None = None) -> Engine:
    """The engine ``engine.kind`` around the network ``name``, whose weights must be the same on every rank.

    Args:
        batch: this rank's images per step.
        precision: of the training; "bf16_weights" makes the module's weights bf16, "fp16" scales the loss.
        state: optimizer state of a checkpoint, at any world size and stage.
    """
    if engine.checkpoint_activations:
        blocks = getattr(module, "blocks", None)
        if blocks is None:
            raise UserError(f"training.engine.checkpoint_activations works block by block, and this {name} has none; leave it "
                            "out.")
        for block in blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if name in engine.compile:
        module.compile()
    if engine.plain(world, precision) or not any(parameter.requires_grad for parameter in module.parameters()):
        return TorchEngine(module, optimizer, world, accumulation=engine.accumulation, scales=precision == "fp16", state=state)
    from training.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(module, optimizer, world, engine, zero=engine.stage(name), batch=batch // engine.accumulation,
                           bf16=precision == "bf16_weights", state=state)


def whole_weights(engine: Engine, to: int | None = None) -> dict[str, Tensor]:
    """The network's state dict, whole, on the CPU: float32 weights and buffers. A collective."""
    return completed(engine, engine.gather(engine.masters(), to), to)


def completed(engine: Engine, gathered: dict[str, Tensor], to: int | None) -> dict[str, Tensor]:
    """``gathered`` with what of the network's state dict no master holds: its buffers, and weights that are not trained."""
    if to in (None, engine.world.rank):
        gathered |= {name: (value.float() if value.is_floating_point() else value).detach().cpu().clone()
                     for name, value in engine.module.state_dict().items() if name not in gathered}
    return gathered
