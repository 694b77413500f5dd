"""Search spaces, and the candidates drawn from them: a pure function of (space, method, count, seed)."""

from __future__ import annotations

import itertools
import math
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


def candidates(space: Mapping[str, Axis], method: str, count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` different settings of the axes that ``method`` reads, as dotted recipe keys.

    A space of lists only is a grid: all of it when it has ``count`` points, else points drawn without repetition; a smaller
    grid is drawn whole and the rest of the trials repeat nothing: every method gets min(count, points).

    The search trials of unlike methods are made equal by `fair_count`.
    """
    axes = {name: axis for name, axis in space.items() if name in METHODS[method].hyperparameters}
    rng = random.Random(content_id(method, sorted(axes), seed))
    lists = [axis for axis in axes.values() if isinstance(axis, list)]
    if len(lists) == len(axes):
        points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*lists)]
        if len(points) > count:
            points = rng.sample(points, count)
    else:
        points = [{name: _draw(axis, rng) for name, axis in axes.items()} for _ in range(count)]
    return [{f"adaptation.{name}": value for name, value in point.items()} for point in points]


def fair_count(space: Mapping[str, Axis], methods: tuple[str, ...], count: int) -> int:
    """The search trials that every method can be given: ``count``, or the smallest method's grid if that is less."""
    return min([count, *(len(candidates(space, method, count, 0)) for method in methods)])


def _draw(axis: Axis, rng: random.Random) -> Any:
    if isinstance(axis, list):
        return rng.choice(axis)
    ((kind, (low, high)),) = axis.items()
    return math.exp(rng.uniform(math.log(low), math.log(high))) if kind == "loguniform" else rng.uniform(low, high)
