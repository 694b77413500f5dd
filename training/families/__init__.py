"""Families of generative models by name: a file and a line each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data_shards.errors import UserError
from training.families.copier import COPIER
from training.families.cyclegan import CYCLEGAN
from training.families.density import DENSITY
from training.families.family import Family
from training.families.gan import GAN, gan_phases
from training.families.phase import Batch, Networks, Phase, Terms
from training.families.sequence import SEQUENCE
from training.families.vae import AUTOENCODER, VAE
from training.families.vaegan import VAEGAN

if TYPE_CHECKING:
    from training.recipe import TrainingConfig

__all__ = ["FAMILIES", "Batch", "Family", "Networks", "Phase", "Terms", "check_generates", "gan_phases"]

FAMILIES: dict[str, Family] = {
    "gan": GAN, "cyclegan": CYCLEGAN, "vae": VAE, "autoencoder": AUTOENCODER, "vaegan": VAEGAN, "density": DENSITY,
    "copier": COPIER, "sequence": SEQUENCE}


def check_generates(config: TrainingConfig, what: str) -> None:
    """Raises `UserError` for a family that translates, where a generator is needed that makes images from latents.

    Args:
        what: what is of that family, with its verb.
    """
    if FAMILIES[config.family].translates:
        raise UserError(f"{what} of the family {config.family}, which translates images and makes none from noise; translate a "
                        "set by `graft sample RUN --from SET`, with --shards as a set that can be scored.")
