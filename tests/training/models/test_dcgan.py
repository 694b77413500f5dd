"""DCGAN's shape."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from data_shards import UserError
from tests.training.models.make import latents, parameters, small_gan
from training.models import make_gan
from training.models.config import DiscriminatorConfig, GeneratorConfig


def test_the_papers_widths_have_the_papers_parameters() -> None:
    """64 pixels, z of 100, 1024 channels at 4 x 4 (Radford et al. 2016, figure 1); D mirrors G and has no bias at its head."""
    with torch.device("meta"):
        networks = make_gan(GeneratorConfig(channels=128, latent_dim=100), DiscriminatorConfig(channels=128), (3, 64, 64))
    widths = [1024, 512, 256, 128, 3]
    transposed = sum(inside * outside * 16 + outside for inside, outside in pairwise(widths))
    assert parameters(networks["generator"]) == 101 * 1024 * 16 + transposed
    down = widths[::-1]
    assert parameters(networks["discriminator"]) == 1024 * 16 + sum(
        inside * outside * 16 + outside for inside, outside in pairwise(down))


@pytest.mark.parametrize("shape", [(1, 30, 30), (1, 28, 32), (1, 8, 8)])
def test_sizes_that_do_not_double_from_4_to_7_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match="28, 32, 48, 64"):
        small_gan("dcgan", shape)


def test_a_row_of_a_class_scales_and_shifts_the_first_feature_map() -> None:
    g, _ = small_gan("dcgan", classes=2)
    g.films[0].class_embedding.weight.data[1] = torch.cat(  # type: ignore[index,union-attr]  # Module.__getattr__ is untyped
        [torch.full((8,), 0.5), torch.full((8,), 0.25)])
    z = latents(1)
    plain = g.project(z).view(1, 8, 4, 4)  # type: ignore[operator]
    moved = g.films[0](plain, torch.tensor([1]))  # type: ignore[index,operator]
    torch.testing.assert_close(moved, plain * 1.5 + 0.25)
