"""The training loop, the same for pretraining, fine-tuning and the inner loop of meta-learning."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from data_shards.errors import Failure
from training.draws import latents
from training.ema import update_average
from training.engines import Engine
from training.families import Batch, Phase
from training.schedule import Schedule, value_at
from training.stopping import CHECK_EVERY_STEPS, StopAsked, Stopped
from training.world import World, any_rank, device, has_bf16, mean_over_ranks


@dataclass(frozen=True)
class Plan:
    """How long and how: everything the loop reads that is not state. Times are images seen."""

    until: int
    batch: int  # global
    seed: int
    latent_dim: int
    lr: Mapping[str, Schedule]  # by network
    weights: Mapping[str, Schedule]  # by penalty
    ema_halflife_images: Schedule
    precision: str = "fp32"
    report_every_images: int = 0  # 0: at the end only
    snapshot_every_images: int = 0  # 0: at the end only


@dataclass
class State:
    """Everything that a step changes."""

    engines: dict[str, Engine]
    averages: dict[str, nn.Module]
    images: int = 0
    sums: dict[str, Tensor | float] = field(default_factory=dict)  # metrics since the last report
    steps: int = 0  # likewise
    waited_s: float = 0.0  # likewise, for data
    clock: float = field(default_factory=time.monotonic)

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {name: engine.module for name, engine in self.engines.items()}


class NonFinite(Failure):
    """A loss or a weight became NaN or infinite; what was saved before is good."""


Report = Callable[[State, dict[str, float]], None]
Snapshot = Callable[[State], None]


def train(state: State, phases: Sequence[Phase], batches: Iterator[Tensor], plan: Plan, *, world: World | None = None,
          report: Report | None = None, snapshot: Snapshot | None = None, stop: StopAsked | None = None,
          between: Callable[[], None] | None = None) -> State:
    """Train until ``plan.until`` images have been seen.

    Args:
        batches: this rank's share of each global batch, uint8 NCHW, from the position ``state.images`` on.
        report: called with the means of all terms over the ranks since the last call, and images/s.
        snapshot: called after a report of finite values.
        between: called before each step, when all ranks are at the same place.
        stop: whether this rank was asked to stop; if any was, all do, within `CHECK_EVERY_STEPS` steps and after a snapshot.

    Raises:
        Stopped: when it was asked for.
        NonFinite: when a loss was not finite; nothing is saved after it.
    """
    world = world or World()
    start = state.images
    while True:
        done = state.images >= plan.until
        if state.steps and (done or _due(state.images, plan.batch, plan.report_every_images)):
            metrics = _collect(state, plan, world)
            if report:
                report(state, metrics)
        if snapshot and state.images > start and (done or _due(state.images, plan.batch, plan.snapshot_every_images)):
            _check_finite(state)
            snapshot(state)
        if done:
            return state
        if stop and state.images // plan.batch % CHECK_EVERY_STEPS == 0 and any_rank(stop(), world):
            if snapshot and state.images > start and not _due(state.images, plan.batch, plan.snapshot_every_images):
                _check_finite(state)
                snapshot(state)
            raise Stopped(state.images)
        if between:
            between()

        started = time.monotonic()
        images = to_signed(next(batches))
        state.waited_s += time.monotonic() - started
        batch = Batch(
            images=images,
            latents={phase.network: latents(plan.seed, phase.network, state.images, plan.batch, plan.latent_dim,
                                            world).to(images.device) for phase in phases},
            weights={name: value_at(weight, state.images) for name, weight in plan.weights.items()})

        for phase in phases:
            with only(phase.network, state.engines):
                with autocast(plan.precision):
                    terms = phase.loss(state.networks, batch)
                engine = state.engines[phase.network]
                engine.backward(terms["total"])
                engine.step(value_at(plan.lr[phase.network], state.images))
            for name, value in terms.items():
                key = f"{phase.network}/{name}"
                state.sums[key] = state.sums.get(key, 0) + value.detach()

        for name, average in state.averages.items():
            update_average(average, state.engines[name].module, batch=plan.batch,
                           halflife_images=value_at(plan.ema_halflife_images, state.images))
        state.images += plan.batch
        state.steps += 1


def to_signed(images: Tensor) -> Tensor:
    """uint8 NCHW -> float32 [-1, 1] on this process's device."""
    return images.to(device(), non_blocking=True).float() / 127.5 - 1.0


def autocast(precision: str) -> AbstractContextManager[object]:
    """bf16 autocast under "bf16", and under "auto" where the processor itself computes bf16."""
    if precision == "fp32" or (precision == "auto" and not has_bf16()):
        return nullcontext()
    return torch.autocast(device().type, dtype=torch.bfloat16)


@contextmanager
def only(network: str, engines: Mapping[str, Engine]) -> Iterator[None]:
    """While inside, only ``network`` gathers gradients; after it every parameter is as it was."""
    others = [p for name, engine in engines.items() if name != network
              for p in engine.module.parameters() if p.requires_grad]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _due(images: int, batch: int, every: int) -> bool:
    """Whether the step that ended at ``images`` crossed a multiple of ``every``."""
    return every > 0 and images > 0 and images // every != (images - batch) // every


def _collect(state: State, plan: Plan, world: World) -> dict[str, float]:
    elapsed = time.monotonic() - state.clock
    metrics = {name: float(total) / state.steps for name, total in state.sums.items()}
    metrics["data_wait"] = state.waited_s / max(elapsed, 1e-9)
    metrics = mean_over_ranks(metrics, world)
    metrics["images_per_second"] = state.steps * plan.batch / max(elapsed, 1e-9)
    state.sums, state.steps, state.waited_s, state.clock = {}, 0, 0.0, time.monotonic()
    broken = [name for name, value in metrics.items() if not math.isfinite(value)]
    if broken:
        raise NonFinite(f"{broken[0]} is not finite after {state.images} images; lower the learning rates or raise r1 and "
                        f"r2. The last checkpoint is good.")
    return metrics


def _check_finite(state: State) -> None:
    for name, network in state.networks.items():
        if not all(bool(torch.isfinite(p).all()) for p in network.parameters()):
            raise NonFinite(f"weights of the {name} are not finite after {state.images} images; the last checkpoint is good.")
