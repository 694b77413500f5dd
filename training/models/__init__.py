"""Network shapes by name. A shape is a pair of makers; networks carry no batch statistics."""

from __future__ import annotations

from training.models.dcgan import make_dcgan

MODELS = {"dcgan": make_dcgan}
