"""Networks of GANs by name: a file and a line each. A shape makes a generator and a discriminator; neither carries batch
statistics.

A generator has ``latent_dim``, ``classes``, ``blocks`` from the latent's side, ``parts()``, and takes ``(z, labels=None)``. A
discriminator has ``classes``, ``blocks`` from the image's side, ``features()`` and ``head``, and takes ``(images,
labels=None)``. Labels are (N,) int64; unconditional networks (classes = 0) ignore them, conditional ones need them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from data_shards.errors import UserError
from training.models.config import DiscriminatorConfig, GeneratorConfig
from training.models.dcgan import make_dcgan
from training.models.layers import Shape, with_options
from training.models.miner import with_miner
from training.models.mlp import make_mlp
from training.models.r3gan import make_r3gan
from training.models.resnet import make_resnet
from training.models.style import make_style

Maker = Callable[[GeneratorConfig, DiscriminatorConfig, Shape, int], dict[str, nn.Module]]

MODELS: dict[str, Maker] = {
    "dcgan": make_dcgan,
    "mlp": make_mlp,
    "resnet": make_resnet,
    "r3gan": make_r3gan,
    "style": make_style,
}


def make_gan(generator: GeneratorConfig, discriminator: DiscriminatorConfig, shape: Shape,
             packed: int = 1) -> dict[str, nn.Module]:
    """``{"generator", "discriminator"}`` of the model that ``generator`` names, for samples of ``shape``.

    Args:
        packed: samples that D judges together, joined on channels (Lin et al. 2018, PacGAN).

    Raises:
        UserError: for a shape, or settings, that the model cannot serve.
    """
    if generator.classes and packed > 1:
        raise UserError(f"packs of {packed} images and training.generator.classes = {generator.classes} exclude each other: a "
                        "pack would have several classes, and D's projection takes one; use one of the two.")
    networks = MODELS[generator.model](generator, discriminator, shape, packed)
    return {"generator": with_miner(networks["generator"], generator.miner_layers),
            "discriminator": with_options(networks["discriminator"], discriminator)}
