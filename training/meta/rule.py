"""What a rule of meta-learning is, and the inner loop and query gradients that rules share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from data_shards import Batch as Images
from data_shards.errors import UserError
from training.engines import EngineConfig, make_engine
from training.families import Batch, Networks, Phase
from training.loop import Plan, State, drawn, train
from training.optimizers import OptimizerConfig
from training.world import World

Weights = dict[str, dict[str, Tensor]]
"""Network name -> parameter name -> tensor."""
Metrics = dict[str, float]


@dataclass(frozen=True)
class Inner:
    """One task: networks that hold the shared weights, and what they are adapted on."""

    networks: Networks
    phases: Sequence[Phase]
    plan: Plan  # of the inner loop
    optimizers: Mapping[str, OptimizerConfig]  # by network
    parts: Sequence[str]  # patterns of the weights that the inner loop adapts
    support: Iterator[Images]
    queries: Iterator[Images]  # used by rules that differentiate a query set's loss
    query_count: int


@dataclass(frozen=True)
class Rule:
    """How a task says where the shared weights phi should go.

    Args:
        gradients: of phi from one task, whose mean over tasks the outer optimizer descends; and the inner loop's terms. It may
            change the networks.
        queries: whether it reads a query set.
        inner_optimizers: those of `meta.inner_optimizer` that it goes with.
        refuse: raises `UserError` for a family of that name, or networks, that it cannot serve.
    """

    gradients: Callable[[Inner], tuple[Weights, Metrics]]
    queries: bool = False
    inner_optimizers: tuple[str, ...] = ("adam", "sgd")
    refuse: Callable[[str, Networks], None] = lambda family, networks: None


def trainable(networks: Networks) -> Weights:
    """The networks' own parameters, those that gather gradients."""
    return {name: {key: p for key, p in network.named_parameters() if p.requires_grad} for name, network in networks.items()}


def chosen(networks: Networks, patterns: Sequence[str]) -> dict[str, list[str]]:
    """By network, the parameters of which ``<network>.<parameter>`` matches one of the shell patterns.

    Raises:
        UserError: for a pattern that matches none.
    """
    weights = trainable(networks)
    known = [f"{name}.{key}" for name, named in weights.items() for key in named]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise UserError(f"meta.inner_parts has {pattern!r}, which matches no weight; they are called "
                            f"{', '.join(known[:3])} and so on to {known[-1]}.")
    return {name: [key for key in named if any(fnmatchcase(f"{name}.{key}", pattern) for pattern in patterns)]
            for name, named in weights.items()}


def adapt(inner: Inner) -> Metrics:
    """The inner loop, by the same loop and engines as all training: the networks end at the task's weights. What the patterns
    leave out keeps its bits (ANIL, Raghu et al. 2020, section 4, adapts the head only)."""
    weights, adapted = trainable(inner.networks), chosen(inner.networks, inner.parts)
    for name, named in weights.items():
        for key, parameter in named.items():
            parameter.requires_grad_(key in adapted[name])
    engines = {name: make_engine(name, network, inner.optimizers[name], EngineConfig(kind="torch"), World(),
                                 batch=inner.plan.batch) for name, network in inner.networks.items()}
    metrics: Metrics = {}
    train(State(engines, {}), [phase for phase in inner.phases if adapted[phase.network]], inner.support, inner.plan,
          report=lambda _, found: metrics.update(found))
    for named in weights.values():
        for parameter in named.values():
            parameter.requires_grad_(True)
    for engine in engines.values():
        engine.close()
    return metrics


def query_batch(inner: Inner) -> Batch:
    """The query set with draws of its own: those that a step after the inner loop would have."""
    return drawn(next(inner.queries), inner.phases, inner.plan, at=inner.plan.until, count=inner.query_count)


def add(total: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """``total += more``, tensor by tensor, in place."""
    for key, value in more.items():
        total[key] = total[key] + value if key in total else value


def query_gradients(networks: Networks, phases: Sequence[Phase], batch: Batch) -> tuple[Weights, Metrics]:
    """Each network's gradient of its own phases' loss at the networks' weights, in float32, and those losses."""
    weights = trainable(networks)
    found: Weights = {name: {key: torch.zeros_like(p) for key, p in named.items()} for name, named in weights.items()}
    metrics: Metrics = {}
    for phase in phases:
        own = weights[phase.network]
        loss = phase.loss(networks, batch)["total"]
        gradients = torch.autograd.grad(loss, list(own.values()), materialize_grads=True)
        add(found[phase.network], dict(zip(own, gradients, strict=True)))
        metrics[f"{phase.network}/query"] = metrics.get(f"{phase.network}/query", 0.0) + loss.item()
    return found, metrics
