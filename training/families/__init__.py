"""Families of generative models by name: a file and a line each."""

from __future__ import annotations

from training.families.density import DENSITY
from training.families.family import Family
from training.families.gan import GAN, gan_phases
from training.families.phase import Batch, Networks, Phase, Terms
from training.families.sequence import SEQUENCE
from training.families.vae import AUTOENCODER, VAE
from training.families.vaegan import VAEGAN

__all__ = ["FAMILIES", "Batch", "Family", "Networks", "Phase", "Terms", "gan_phases"]

FAMILIES: dict[str, Family] = {
    "gan": GAN, "vae": VAE, "autoencoder": AUTOENCODER, "vaegan": VAEGAN, "density": DENSITY, "sequence": SEQUENCE}
