"""What a step costs: floating-point operations, where the time goes, memory."""

from __future__ import annotations

import copy
import functools
import logging
import resource
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from training.families import Batch, Phase
from training.loop import only
from training.world import World, device, has_bf16, mean_over_ranks

# TFLOP/s of dense matrices by a part of CUDA's device name, from NVIDIA's data sheets; the first that fits counts.
PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "H200": {"bf16": 989.4, "tf32": 494.7, "fp32": 66.9},
    "H100 PCIe": {"bf16": 756.0, "tf32": 378.0, "fp32": 51.2},
    "H100": {"bf16": 989.4, "tf32": 494.7, "fp32": 66.9},
    "A100": {"bf16": 312.0, "tf32": 156.0, "fp32": 19.5},
}
COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter",
               "reduce_scatter_tensor", "all_to_all_single", "gather", "scatter", "barrier")
SHARES = ("data", "communication", "checkpoint", "health")

Item = TypeVar("Item")
logger = logging.getLogger("graft")


def step_flops(phases: Sequence[Phase], networks: Mapping[str, nn.Module], batch: Batch,
               every: Mapping[str, int] | None = None) -> float:
    """Floating-point operations of one step over ``batch`` (a `blank_batch`), a multiplication and an addition being two; of a
    network that is stepped every k-th time, a k-th.

    Counted by running the step's phases on the meta device, where nothing is computed: matrix products, convolutions and
    attention, forward, backward, and backward through the penalties' gradients. Not counted is what works element by
    element: activations, norms, augmentation, optimizer and moving average; nor what activation checkpointing
    computes again.
    """
    meta = {name: copy.deepcopy(network).to("meta") for name, network in networks.items()}
    engines: Any = {name: SimpleNamespace(module=network) for name, network in meta.items()}
    flops = 0.0
    no_autocast = _replaced(torch, autocast=lambda *_arguments, **_named: nullcontext())  # the meta device has none
    with torch.random.fork_rng(devices=[]), no_autocast:
        for phase in phases:
            with only(phase.network, engines), _Counter() as counter:
                phase.loss(meta, phase.prepared(meta, batch, World()))["total"].backward()
            flops += counter.flops / (every or {}).get(phase.network, 1)
    return flops


def known_flops(phases: Sequence[Phase], networks: Mapping[str, nn.Module], batch: Batch, every: Mapping[str, int]) -> float:
    """`step_flops`, or 0 and a warning where a network does something that has no meaning on the meta device."""
    try:
        return step_flops(phases, networks, batch, every)
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        logger.warning("the floating-point operations of a step cannot be counted (%s), so cost/tflops is 0", reason)
        return 0.0


class _Counter(TorchDispatchMode):
    """Sums torch's own operation counts. Its FlopCounterMode hooks modules too, which a penalty's inner gradient breaks."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket is torch.ops.aten.convolution_backward:
            self.flops += _convolution_backward_flops(*args)
        elif func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def _convolution_backward_flops(output_gradient: Tensor, inputs: Tensor, weight: Tensor, _bias: Any, _stride: Any,
                                _padding: Any, _dilation: Any, transposed: bool, _out: Any, _groups: int,
                                wanted: Sequence[bool]) -> int:
    """The gradients of inputs and of weights cost what the forward pass does: 2 per weight and position. torch 2.13's own
    formula counts the weights' gradient of a grouped convolution once per group too often."""
    positions = (inputs if transposed else output_gradient).shape[2:].numel() * len(inputs)
    return sum(wanted[:2]) * 2 * positions * weight.numel()


def blank_batch(phases: Sequence[Phase], image_shape: tuple[int, int, int], latent_dim: int, weights: Mapping[str, float],
                count: int, *, two_sets: bool = False) -> Batch:
    """A batch of ``count`` blank images (of each of two sets) with the latents of every phase, on the meta device."""
    images = torch.empty(count, *image_shape, device="meta")
    return Batch(images=images, images_b=images if two_sets else None, weights=weights,
                 labels=torch.empty(count, dtype=torch.int64, device="meta"),
                 latents={phase.network: torch.empty(count, latent_dim, device="meta") for phase in phases},
                 uniforms={f"{phase.network} {purpose}": torch.zeros(count, draws, dtype=torch.float64, device="meta")
                           for phase in phases for purpose, draws in phase.uniforms.items() if draws})


@dataclass
class Clock:
    """Seconds of one thread by what they went to. A stretch inside another counts for the outer one only, so the parts add up
    to at most the whole."""

    started: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SHARES, 0.0))
    thread: int = field(default_factory=threading.get_ident)
    inside: bool = False

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        if self.inside or threading.get_ident() != self.thread:
            yield
            return
        self.inside, began = True, time.monotonic()
        try:
            yield
        finally:
            self.inside = False
            self.seconds[name] += time.monotonic() - began

    def each(self, name: str, items: Iterator[Item]) -> Iterator[Item]:
        """The items, each waited for under ``name``."""
        while True:
            with self.timed(name):
                item = next(items)
            yield item

    def shares(self) -> dict[str, float]:
        """Each part's share of the time since the last call."""
        now = time.monotonic()
        elapsed = max(now - self.started, 1e-9)
        shares = {name: seconds / elapsed for name, seconds in self.seconds.items()}
        self.started, self.seconds = now, dict.fromkeys(SHARES, 0.0)
        return shares


@contextmanager
def timed_collectives(clock: Clock) -> Iterator[None]:
    """While inside, the time that this thread spends in torch's collectives, waiting for slower ranks included, goes to
    "communication". DeepSpeed's go through torch's. On CUDA a collective returns before it is done, so nothing is timed."""
    if not dist.is_initialized() or device().type == "cuda":
        yield
        return

    def timed(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*arguments: Any, **named: Any) -> Any:
            with clock.timed("communication"):
                work = original(*arguments, **named)
            return _TimedWork(work, clock) if isinstance(work, dist.Work) else work

        return call

    with _replaced(dist, **{name: timed(getattr(dist, name)) for name in COLLECTIVES}):
        yield


@contextmanager
def _replaced(module: Any, **others: Any) -> Iterator[None]:
    """While inside, these names of the module stand for something else."""
    originals = {name: getattr(module, name) for name in others}
    for name, other in others.items():
        setattr(module, name, other)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(module, name, original)


class _TimedWork:
    """An asynchronous collective's handle, whose waiting is timed."""

    def __init__(self, work: dist.Work, clock: Clock) -> None:
        self._work, self._clock = work, clock

    def wait(self, *arguments: Any, **named: Any) -> Any:
        with self._clock.timed("communication"):
            return self._work.wait(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


@dataclass(frozen=True)
class Budget:
    """What a step needs and what a worker could do."""

    flops_per_image: float
    peak_flops: float  # of one worker, per second
    peak_measured: bool  # by a matrix product here, for want of a data sheet


def cost_metrics(clock: Clock, budget: Budget, images: int, world: World) -> dict[str, float]:
    """``cost/*`` of the time since the last call, in which ``images`` were seen: shares of time and memory as means over the
    ranks, TFLOP/s of all workers together. A collective."""
    elapsed = max(time.monotonic() - clock.started, 1e-9)
    local = {f"cost/{name}": share for name, share in clock.shares().items() if name != "communication" or _sees(world)}
    local["cost/peak_memory_gb"] = peak_memory() / 1e9
    rate = budget.flops_per_image * images / elapsed
    local["cost/share_of_peak"] = rate / (budget.peak_flops * world.size)
    return mean_over_ranks(local, world) | {
        "cost/tflops": rate / 1e12, "cost/gflop_per_image": budget.flops_per_image / 1e9,
        "cost/peak_measured": float(budget.peak_measured)}


def _sees(world: World) -> bool:
    """Whether the time in collectives is known."""
    return world.size == 1 or device().type != "cuda"


def peak_memory() -> int:
    """Most bytes that this process has held: of the accelerator where there is one, else resident."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops(precision: str) -> tuple[float, bool]:
    """FLOP/s that a worker's device could reach in ``precision`` (of the recipe), and whether that was measured here.

    The data sheet's figure for dense matrices where the device is a known accelerator, else what one product of two
    matrices of 1024 by 1024 reaches here, now and with this process's threads: the best of several in 0.2 s.
    """
    half = precision == "bf16" or (precision == "auto" and has_bf16())
    place = device()
    if place.type == "cuda":
        kind = "bf16" if half else "tf32" if torch.backends.cudnn.allow_tf32 else "fp32"
        name = torch.cuda.get_device_name(place)
        for part, peaks in PEAK_TFLOPS.items():
            if all(word in name for word in part.split()):
                return peaks[kind] * 1e12, False
    matrix = torch.ones(1024, 1024, device=place, dtype=torch.bfloat16 if half else torch.float32)
    best, end = float("inf"), time.monotonic() + 0.2
    while time.monotonic() < end:
        began = time.monotonic()
        matrix @ matrix
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        best = min(best, time.monotonic() - began)
    return 2 * 1024**3 / best, True


NEEDED = {"images_per_second", "cost/gflop_per_image", "cost/share_of_peak", "cost/peak_memory_gb", "cost/peak_measured"}


def cost_line(events: Sequence[Mapping[str, Any]], batch: int) -> str:
    """One line over a whole pretraining's log, means weighted by time; empty where nothing was measured."""
    last, spent, images, sums, memory, measured = 0, 0.0, 0, dict[str, float](), 0.0, False
    for event in events:
        metrics, seen = event["metrics"], event["images"] - last
        last = event["images"]
        if not metrics.keys() >= NEEDED or seen <= 0 or metrics["images_per_second"] <= 0:
            continue
        seconds = seen / metrics["images_per_second"]
        spent, images = spent + seconds, images + seen
        memory = max(memory, metrics["cost/peak_memory_gb"])
        measured = measured or bool(metrics["cost/peak_measured"])
        for name in (*SHARES, "share_of_peak", "gflop_per_image"):
            if f"cost/{name}" in metrics:
                sums[name] = sums.get(name, 0.0) + seconds * metrics[f"cost/{name}"]
    if not images:
        return ""
    mean = {name: total / spent for name, total in sums.items()}
    each, rate = mean["gflop_per_image"], images / spent
    shares = ", ".join(f"{name} {100 * mean[name]:.1f} %" for name in SHARES if name in mean)
    peak = "a matrix product reaches here" if measured else "the device's data sheet gives"
    return (f"{each:.3g} GFLOP an image, {each * batch:.3g} a step; {rate:.4g} images/s, {each * rate / 1e3:.3g} TFLOP/s, "
            f"{100 * mean['share_of_peak']:.0f} % of what {peak}; of the time: {shares}; peak memory {memory:.2f} GB a worker")
