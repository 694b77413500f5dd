"""Networks of GANs by name: a file and a line each. A shape makes a generator and a discriminator; neither carries batch
statistics.

A generator has ``latent_dim``, ``classes``, ``blocks`` from the latent's side, ``parts()``, and takes ``(z, labels=None)``. A
discriminator has ``classes``, ``blocks`` from the image's side, ``features()`` and ``head``, and takes ``(images,
labels=None)``. Labels are (N,) int64; unconditional networks (classes = 0) ignore them, conditional ones need them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from training.models.config import DiscriminatorConfig, GeneratorConfig
from training.models.dcgan import make_dcgan
from training.models.layers import Shape, check_unpacked, with_options
from training.models.mlp import make_mlp
from training.models.r3gan import make_r3gan
from training.models.resnet import make_resnet
from training.models.style import make_style

Maker = Callable[[GeneratorConfig, DiscriminatorConfig, Shape], dict[str, nn.Module]]

MODELS: dict[str, Maker] = {
    "dcgan": make_dcgan,
    "mlp": make_mlp,
    "resnet": make_resnet,
    "r3gan": make_r3gan,
    "style": make_style,
}


def make_gan(generator: GeneratorConfig, discriminator: DiscriminatorConfig, shape: Shape) -> dict[str, nn.Module]:
    """``{"generator", "discriminator"}`` of the model that ``generator`` names, for samples of ``shape``.

    Raises:
        UserError: for a shape, or settings, that the model cannot serve.
    """
    check_unpacked(discriminator, generator.classes)
    networks = MODELS[generator.model](generator, discriminator, shape)
    return networks | {"discriminator": with_options(networks["discriminator"], discriminator)}
