"""SNGAN's residual shape."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import interpolate, relu

from tests.training.models.make import parameters, pictures, small_gan, stir
from training.models import make_gan
from training.models.config import DiscriminatorConfig, GeneratorConfig
from training.models.resnet import Down, Normalised, Up


def test_parameters_at_the_papers_widths() -> None:
    """256 channels in G, 128 in D (Miyato et al. 2018, table 4), with the same 3 blocks in G and one halving more in D."""
    with torch.device("meta"):
        networks = make_gan(GeneratorConfig(model="resnet", channels=256, growth=1),
                            DiscriminatorConfig(channels=128, growth=1), (3, 32, 32))
    c = 256
    up = 2 * (9 * c * c + c) + c * c + c + 4 * c  # two convolutions, skip, two normalisations
    assert parameters(networks["generator"]) == 129 * 16 * c + 3 * up + 2 * c + 27 * c + 3
    c = 128
    first, down, last = 27 * c + c + 9 * c * c + c + 3 * c + c, 2 * (9 * c * c + c) + c * c + c, 2 * (9 * c * c + c)
    assert parameters(networks["discriminator"]) == first + 2 * down + last + c


def test_normalisation_looks_at_one_sample() -> None:
    layer = Normalised(32, 0)
    x = pictures(4, (32, 5, 5)) * 3 + 1
    groups = x.view(4, 8, -1)
    by_hand = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(layer(x, None), relu(by_hand.view_as(x)))


def test_blocks_are_the_papers_sums() -> None:
    up, down = Up(4, 6, (8, 8), 0), Down(4, 6)
    for block in (up, down):
        stir(block)
    x = pictures(2, (4, 4, 4))
    larger = interpolate(up.first(x, None), size=(8, 8), mode="bilinear", align_corners=False)
    branch = up.conv2(up.second(up.conv1(larger), None))
    torch.testing.assert_close(up(x, None), branch + interpolate(up.skip(x), size=(8, 8), mode="bilinear", align_corners=False))
    pool = nn.AvgPool2d(2)
    torch.testing.assert_close(down(x), pool(down.conv2(relu(down.conv1(relu(x))))) + pool(down.skip(x)))


def test_features_are_sums_over_places() -> None:
    _, d = small_gan("resnet")
    x = pictures(2)
    for block in d.blocks:  # type: ignore[union-attr]  # Module.__getattr__ is untyped
        x = block(x)
    torch.testing.assert_close(d.features(pictures(2)), relu(x).sum((2, 3)))  # type: ignore[operator]
