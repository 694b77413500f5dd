"""The training loop, the same for pretraining, fine-tuning and the inner loop of meta-learning."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from data_shards import Batch as Images
from data_shards.errors import Failure
from training.augment import NO_AUGMENTATION, AugmentConfig, Strength, steer, strength_at
from training.draws import latents, uniforms
from training.ema import Average, update_average
from training.engines import Engine
from training.families import Batch, Phase, Terms
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
    augmentation: AugmentConfig = NO_AUGMENTATION
    every: Mapping[str, int] = field(default_factory=dict)  # by network: steps of training between two of its own
    accumulation: int = 1  # micro-batches per step
    precision: str = "fp32"
    rescues: int = 0  # times that the learning rates may be halved because gradients were not finite
    report_every_images: int = 0  # 0: at the end only
    snapshot_every_images: int = 0  # 0: at the end only


@dataclass
class Sums:
    """Of one network's steps since the last report; those left out for a gradient that was not finite add to ``taken`` only."""

    values: Tensor
    finite: Tensor
    taken: int = 0


@dataclass
class State:
    """Everything that a step changes."""

    engines: dict[str, Engine]
    averages: dict[str, Average]
    images: int = 0
    strength: Strength = field(default_factory=Strength)  # of adaptive augmentation
    lr_scale: float = 1.0  # halved by each rescue
    rescues: int = 0
    sums: dict[tuple[str, ...], Sums] = field(default_factory=dict)  # by network and names of terms, since the last report
    steps: int = 0  # likewise
    waited_s: float = 0.0  # likewise, for data
    clock: float = field(default_factory=time.monotonic)

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {name: engine.module for name, engine in self.engines.items()}


class NonFinite(Failure):
    """A loss or a weight became NaN or infinite; what was saved before is good."""


logger = logging.getLogger("graft")
Report = Callable[[State, dict[str, float]], None]
Snapshot = Callable[[State], None]


def train(state: State, phases: Sequence[Phase], batches: Iterator[Images], plan: Plan, *,
          batches_b: Iterator[Images] | None = None, world: World | None = None,
          report: Report | None = None, snapshot: Snapshot | None = None, stop: StopAsked | None = None,
          between: Callable[[], None] | None = None) -> State:
    """Train until ``plan.until`` images have been seen.

    Args:
        batches: this rank's share of each global batch, from the position ``state.images`` on.
        batches_b: likewise of a second set, for families that translate.
        report: called with the means of all terms over the ranks since the last call, and images/s.
        snapshot: called after a report of finite values.
        between: called before each step, when all ranks are at the same place.
        stop: whether this rank was asked to stop; if any was, all do, within `CHECK_EVERY_STEPS` steps and after a snapshot.

    Raises:
        Stopped: when it was asked for.
        NonFinite: when gradients were not finite more often than ``plan.rescues`` allows; nothing is saved after it.
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
            _check_finite(state, world)
            snapshot(state)
        if done:
            return state
        if stop and state.images // plan.batch % CHECK_EVERY_STEPS == 0 and any_rank(stop(), world):
            if snapshot and state.images > start and not _due(state.images, plan.batch, plan.snapshot_every_images):
                _check_finite(state, world)
                snapshot(state)
            raise Stopped(state.images)
        if between:
            between()

        started = time.monotonic()
        given, given_b = next(batches), next(batches_b) if batches_b else None
        state.waited_s += time.monotonic() - started
        batch = drawn(given, phases, plan, at=state.images, given_b=given_b, strength=state.strength, world=world)

        for phase in phases:
            if state.images // plan.batch % plan.every.get(phase.network, 1):
                continue
            engine = state.engines[phase.network]
            terms: list[Terms] = []
            with only(phase.network, state.engines):
                with autocast(plan.precision):
                    whole = phase.prepared(state.networks, batch, world)
                for part in whole.parts(plan.accumulation):
                    with autocast(plan.precision):
                        terms.append(phase.loss(state.networks, part))
                    engine.backward(terms[-1]["total"])
                norm = engine.step(value_at(plan.lr[phase.network], state.images) * state.lr_scale)
            _add(state.sums, phase.network, terms, norm)
            if plan.augmentation.adaptive and "real_sign" in terms[0]:
                signs = torch.stack([part["real_sign"] for part in terms]).mean()
                sign = mean_over_ranks({"sign": signs.item()}, world)["sign"]
                state.strength = steer(plan.augmentation, state.strength, sign, plan.batch)

        for name, average in state.averages.items():
            update_average(average, state.engines[name], batch=plan.batch,
                           halflife_images=value_at(plan.ema_halflife_images, state.images))
        state.images += plan.batch
        state.steps += 1


def drawn(given: Images, phases: Sequence[Phase], plan: Plan, *, at: int, count: int | None = None,
          given_b: Images | None = None, strength: Strength | None = None, world: World | None = None) -> Batch:
    """This rank's share of a step's batch: the images with the draws and weights of the step after ``at`` images.

    Args:
        count: images of the global batch where they are not ``plan.batch``.
        given_b: those of a second set, for families that translate.
    """
    count = count or plan.batch
    images = to_signed(given.images)
    return Batch(
        images=images, images_b=to_signed(given_b.images) if given_b else None,
        labels=given.labels.to(images.device, non_blocking=True),
        latents={phase.network: latents(plan.seed, phase.network, at, count, plan.latent_dim, world).to(images.device)
                 for phase in phases},
        weights={"augment": strength_at(plan.augmentation, strength or Strength(), at),
                 **{name: value_at(weight, at) for name, weight in plan.weights.items()}},
        uniforms={f"{phase.network} {purpose}": uniforms(plan.seed, f"{phase.network} {purpose}", at, count, numbers, world)
                  for phase in phases for purpose, numbers in phase.uniforms.items() if numbers})


def to_signed(images: Tensor) -> Tensor:
    """uint8 NCHW -> float32 [-1, 1] on this process's device."""
    return images.to(device(), non_blocking=True).float() / 127.5 - 1.0


def autocast(precision: str) -> AbstractContextManager[object]:
    """fp16 or bf16 autocast under the precision of that name, bf16 under "auto" where the processor itself computes it."""
    if precision == "fp32" or (precision == "auto" and not has_bf16()):
        return nullcontext()
    return torch.autocast(device().type, dtype=torch.float16 if precision == "fp16" else torch.bfloat16)


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


def _add(sums: dict[tuple[str, ...], Sums], network: str, parts: Sequence[Terms], norm: Tensor) -> None:
    """A step's terms, means over its micro-batches, and its gradient's norm; if that is not finite the step is counted only."""
    means = [torch.stack([terms[name].detach().float() for terms in parts]).mean() for name in parts[0]]
    values = torch.stack([*means, norm.to(means[0].device)])
    finite = torch.isfinite(values[-1])
    key = (network, *parts[0], "grad_norm")
    if key not in sums:
        sums[key] = Sums(torch.zeros_like(values), torch.zeros_like(values[-1]))
    sums[key].values += torch.where(finite, values, 0.0)
    sums[key].finite += finite
    sums[key].taken += 1


def _collect(state: State, plan: Plan, world: World) -> dict[str, float]:
    """Means since the last report, over the ranks."""
    elapsed = time.monotonic() - state.clock
    totals: dict[str, float] = {}
    counts: dict[str, float] = {}
    skipped = 0
    for (network, *names), sums in state.sums.items():
        finite = int(sums.finite.item())
        skipped += sums.taken - finite
        for name, value in zip(names, sums.values.tolist(), strict=True):
            totals[f"{network}/{name}"] = totals.get(f"{network}/{name}", 0.0) + value
            counts[f"{network}/{name}"] = counts.get(f"{network}/{name}", 0) + finite
    metrics = {name: total / counts[name] if counts[name] else math.nan for name, total in totals.items()}
    if plan.augmentation.adaptive:
        metrics["augment_p"] = state.strength.p
    metrics["data_wait"] = state.waited_s / max(elapsed, 1e-9)
    metrics = mean_over_ranks(metrics, world)
    metrics["images_per_second"] = state.steps * plan.batch / max(elapsed, 1e-9)
    state.sums, state.steps, state.waited_s, state.clock = {}, 0, 0.0, time.monotonic()
    broken = [name for name, value in metrics.items() if not math.isfinite(value)]
    if broken:
        raise NonFinite(f"{broken[0]} is not finite after {state.images} images; lower the learning rates or raise r1 and "
                        f"r2. No checkpoint holds that.")
    if skipped and plan.precision != "fp16":  # whose scale is found by overflowing
        _rescue(state, plan, skipped)
        metrics["skipped_steps"], metrics["lr_scale"] = float(skipped), state.lr_scale
    return metrics


def _rescue(state: State, plan: Plan, skipped: int) -> None:
    """Halve the learning rates because ``skipped`` steps were left out; all ranks do, since the gradient's norm is all's."""
    said = f"{skipped} steps up to {state.images} images had gradients that were not finite and were left out"
    if state.rescues >= plan.rescues:
        raise NonFinite(f"{said}, the learning rates having been halved {state.rescues} times (training.rescues); lower them "
                        f"or raise r1 and r2. No checkpoint holds that.")
    state.rescues += 1
    state.lr_scale /= 2
    logger.warning("%s; the learning rates are halved (%d of %d times).", said, state.rescues, plan.rescues)


def _check_finite(state: State, world: World) -> None:
    for name, engine in state.engines.items():
        tensors = [*engine.masters(), *state.averages.get(name, [])]
        if any_rank(not all(bool(torch.isfinite(values).all()) for values in tensors), world):
            raise NonFinite(f"weights of the {name} are not finite after {state.images} images; no checkpoint holds that.")
