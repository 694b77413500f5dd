"""Adversarial losses by name: pure functions of the two logits, named terms out, never `backward`."""

from __future__ import annotations

from training.objectives.adversarial import Objective, hinge, non_saturating, relativistic

OBJECTIVES: dict[str, Objective] = {"relativistic": relativistic, "non_saturating": non_saturating, "hinge": hinge}
