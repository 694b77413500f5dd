"""Families of generative models: each returns its phases in the order in which a step runs them."""

from training.families.gan import gan_phases
from training.families.phase import Batch, Networks, Phase, Terms

__all__ = ["FAMILIES", "Batch", "Networks", "Phase", "Terms", "gan_phases"]

FAMILIES = {"gan": gan_phases}
