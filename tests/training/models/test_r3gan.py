"""R3GAN's shape."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from data_shards import UserError
from tests.training.models.make import latents, parameters, pictures, small_gan
from training.models import make_gan
from training.models.config import DiscriminatorConfig, GeneratorConfig, R3ganConfig
from training.models.r3gan import Residual


@pytest.mark.parametrize(("size", "channels", "growth", "widths"), [
    (32, 768, 1, [768] * 4),  # CIFAR-10
    (64, 384, 2, [768] * 4 + [384]),  # FFHQ-64
    (256, 96, 8, [768] * 4 + [384, 192, 96]),  # FFHQ-256
])
def test_parameters_at_the_published_widths(size: int, channels: int, growth: int, widths: list[int]) -> None:
    """Two blocks a stage, expansion 2, groups of 16, z of 64 (the paper's code)."""
    settings = R3ganConfig(blocks=2)
    with torch.device("meta"):
        networks = make_gan(
            GeneratorConfig(model="r3gan", channels=channels, growth=growth, latent_dim=64, r3gan=settings),
            DiscriminatorConfig(channels=channels, growth=growth, r3gan=settings), (3, size, size))
    blocks = sum(2 * (2 * w * 2 * w + 2 * w * 16 * 9 + 4 * w) for w in widths)
    transitions = sum(a * b for a, b in pairwise(widths) if a != b)
    ends, basis = 3 * widths[-1], 16 * widths[0]
    assert parameters(networks["generator"]) == blocks + transitions + ends + basis + 64 * widths[0]
    assert parameters(networks["discriminator"]) == blocks + transitions + ends + basis + widths[0]


def test_fix_up_initialisation() -> None:
    """Branches start at 0; the other layers at He's scale times L^(-1/4) (m = 3 layers, L blocks)."""
    settings = R3ganConfig(blocks=2, group_channels=16)
    torch.manual_seed(0)
    block = Residual(64, settings, total_blocks=8)
    assert not block.conv3.weight.any()
    x = pictures(2, (64, 4, 4))
    assert torch.equal(block(x), x)
    gain = math.sqrt(2 / 1.04) * 8**-0.25
    assert float(block.conv1.weight.detach().std()) == pytest.approx(gain / math.sqrt(64), rel=0.05)
    assert float(block.conv2.weight.detach().std()) == pytest.approx(gain / math.sqrt(16 * 9), rel=0.05)
    assert block.conv2.groups == 8


def test_nothing_is_normalised() -> None:
    for network in small_gan("r3gan"):
        assert not [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm)]


def test_dense_convolutions_for_cpus() -> None:
    g, d = small_gan("r3gan", generator={"r3gan": {"group_channels": 0}},
                     r3gan={"group_channels": 0, "expansion": 1, "blocks": 2})
    convolutions = [m for network in (g, d) for name, m in network.named_modules()
                    if isinstance(m, nn.Conv2d) and name != "basis"]
    assert {conv.groups for conv in convolutions} == {1}
    assert g(latents(2)).shape == (2, 1, 16, 16)
    with pytest.raises(UserError, match="group_channels = 5 does not divide the 16"):
        small_gan("r3gan", r3gan={"group_channels": 5} | {"expansion": 2})


def test_the_generator_starts_from_weighted_patterns() -> None:
    g, _ = small_gan("r3gan")
    z = latents(3)
    weights = g.state_dict()
    expected = torch.einsum("chw,nc->nchw", weights["basis.patterns"], z @ weights["basis.linear.weight"].T)
    torch.testing.assert_close(g.basis(z), expected)  # type: ignore[operator]
