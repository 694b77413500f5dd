"""Adversarial losses by name: pure functions of the two logits, named terms out, never `backward`."""

from __future__ import annotations

from pydantic import Field, field_validator

from training.config import Config, one_of
from training.objectives.adversarial import Objective, hinge, non_saturating, relativistic
from training.schedule import Schedule, check_schedule

OBJECTIVES: dict[str, Objective] = {"relativistic": relativistic, "non_saturating": non_saturating, "hinge": hinge}


class ObjectiveConfig(Config):
    loss: str = Field("relativistic", description=f"adversarial loss: {', '.join(OBJECTIVES)}")
    r1: Schedule = Field(1.0, description="weight gamma of the penalty gamma/2 |grad_x D(x)|^2 on real images")
    r2: Schedule = Field(1.0, description="weight gamma of the same penalty on generated images")

    _known = field_validator("loss")(one_of(lambda: OBJECTIVES, "objective"))
    _schedules = field_validator("r1", "r2")(check_schedule)
