"""Adversarial losses and gradient penalties by name: pure functions, never `backward`."""

from __future__ import annotations

from pydantic import Field, field_validator

from training.config import Config, one_of
from training.objectives.adversarial import (
    Objective,
    hinge,
    least_squares,
    minimax,
    non_saturating,
    relativistic,
    wasserstein,
)
from training.objectives.penalties import PENALTIES
from training.schedule import Schedule, check_schedule

__all__ = ["OBJECTIVES", "PENALTIES", "Objective", "ObjectiveConfig"]

OBJECTIVES: dict[str, Objective] = {
    "relativistic": relativistic, "minimax": minimax, "non_saturating": non_saturating, "least_squares": least_squares,
    "wasserstein": wasserstein, "hinge": hinge}


class ObjectiveConfig(Config):
    loss: str = Field("relativistic", description=f"adversarial loss: {', '.join(OBJECTIVES)}")
    r1: Schedule = Field(1.0, description="weight gamma of the penalty gamma/2 |grad_x D(x)|^2 on real images")
    r2: Schedule = Field(1.0, description="weight gamma of the same penalty on generated images")
    gp0: Schedule = Field(0.0, description="weight lambda of lambda |grad_x D(x)|^2 between real and generated images")
    gp1: Schedule = Field(0.0, description="weight lambda of lambda (|grad_x D(x)| - 1)^2 there, WGAN-GP's")
    pack: int = Field(1, ge=1, le=16, description="images that D judges together, stacked along the channels (PacGAN)")

    _known = field_validator("loss")(one_of(lambda: OBJECTIVES, "objective"))
    _schedules = field_validator(*PENALTIES)(check_schedule)

    def penalties(self) -> dict[str, Schedule]:
        """The schedule of each penalty's weight, by the penalty's name."""
        return {name: getattr(self, name) for name in PENALTIES}

    @property
    def penalised(self) -> bool:
        """Whether any penalty ever has a weight."""
        return any(any(value for _, value in weight) if isinstance(weight, list) else weight
                   for weight in self.penalties().values())
