"""Search spaces, and the candidates drawn from them: a pure function of (space, method, count, seed)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from typing import Any

from training.config import content_id
from training.methods import METHODS

Axis = list[Any] | dict[str, tuple[float, float]]
"""Values to choose from, or ``{"uniform": (low, high)}`` or ``{"loguniform": (low, high)}``."""


def check_axis(name: str, axis: Axis) -> None:
    """Refuse an axis that nothing can be drawn from (pydantic turns the ValueError into the user's sentence)."""
    if isinstance(axis, list):
        if not axis or len({str(value) for value in axis}) < len(axis):
            raise ValueError(f"the values of {name} must be at least one and different")
        return
    if len(axis) != 1 or next(iter(axis)) not in ("uniform", "loguniform"):
        raise ValueError(f"{name} must be a list, {{uniform: [low, high]}} or {{loguniform: [low, high]}}")
    ((kind, (low, high)),) = axis.items()
    if not low < high or (kind == "loguniform" and low <= 0):
        raise ValueError(f"the bounds of {name} must rise, and be positive under loguniform")


def ends(axis: Axis) -> list[Any]:
    """The values of a list, or the bounds of an interval."""
    return axis if isinstance(axis, list) else list(next(iter(axis.values())))


def candidates(space: Mapping[str, Axis], method: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Up to ``count`` different settings of the axes that ``method`` reads, as dotted recipe keys.

    Lists alone are a grid: all of its points if there are no more than ``count``, else ``count`` of them. With an interval
    among the axes all are drawn at random (by Optuna's sampler). `fair_count` makes the number equal over methods.
    """
    axes = {name: axis for name, axis in space.items() if name in METHODS[method].hyperparameters}
    draw = int(content_id(method, sorted(axes), seed), 16) % 2**32
    if all(isinstance(axis, list) for axis in axes.values()):
        points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
        if len(points) > count:
            points = random.Random(draw).sample(points, count)
    else:
        points = _drawn(axes, count, draw)
    return [{f"adaptation.{name}": value for name, value in point.items()} for point in points]


def _drawn(axes: Mapping[str, Axis], count: int, seed: int) -> list[dict[str, Any]]:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    distributions: dict[str, BaseDistribution] = {}
    for name, axis in axes.items():
        if isinstance(axis, list):
            distributions[name] = CategoricalDistribution(axis)
        else:
            ((kind, (low, high)),) = axis.items()
            distributions[name] = FloatDistribution(low, high, log=kind == "loguniform")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [study.ask(distributions).params for _ in range(count)]


def fair_count(space: Mapping[str, Axis], methods: tuple[str, ...], count: int) -> int:
    """The search trials that every method can be given: ``count``, or the smallest method's grid if that is less; a method
    that reads no hyper-parameter at all has one, whatever the others have."""
    searched = [method for method in methods if METHODS[method].hyperparameters]
    return min([count, *(len(candidates(space, method, count, 0)) for method in searched)])
