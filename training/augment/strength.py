"""How strong augmentation is: a schedule, or ADA's controller (Karras et al. 2020, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from data_shards.errors import UserError

ADJUST_EVERY_STEPS = 4  # as in the paper


@dataclass(frozen=True)
class Strength:
    """ADA's state: the probability p, and D's signs on real images gathered since p was last moved."""

    p: float = 0.0
    sign_sum: float = 0.0  # over steps, of the step's mean over the global batch
    steps: int = 0

    def as_json(self) -> dict[str, float]:
        return {"p": self.p, "sign_sum": self.sign_sum, "steps": self.steps}


def read_strength(saved: Mapping[str, Any] | None) -> Strength:
    """The state that a checkpoint's `state.json` holds as "augmentation"; a fresh one where it holds none.

    Raises:
        UserError: when it is not such a state.
    """
    if saved is None:
        return Strength()
    try:
        return Strength(float(saved["p"]), float(saved["sign_sum"]), int(saved["steps"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint's augmentation state {dict(saved)} is not one of ADA's; go on from the checkpoint "
                        "before it.") from error


def adjust(state: Strength, sign: float, *, batch: int, target: float, speed_images: float, limit: float) -> Strength:
    """One step of ADA: where r_t = E[sign(D(real))] over `ADJUST_EVERY_STEPS` steps is over ``target``, D overfits and p rises;
    below it p falls.

    Args:
        sign: this step's mean of the sign over the global batch, the same on every rank.
        speed_images: images in which p can go from 0 to 1.
        limit: p stays within [0, limit].
    """
    state = replace(state, sign_sum=state.sign_sum + sign, steps=state.steps + 1)
    if state.steps < ADJUST_EVERY_STEPS:
        return state
    overfit = state.sign_sum / state.steps - target
    direction = (overfit > 0) - (overfit < 0)
    return Strength(min(max(state.p + direction * state.steps * batch / speed_images, 0.0), limit))
