"""Fully connected networks on points."""

from __future__ import annotations

import torch
from torch.func import functional_call, stack_module_state, vmap

from tests.training.models.make import latents, parameters, pictures, small_gan
from training.models import make_gan
from training.models.config import DiscriminatorConfig, GeneratorConfig, MlpConfig


def pacgan_setting(packed: int = 2) -> dict[str, torch.nn.Module]:
    """Points of 2 dimensions, a generator of 400 units, a discriminator of 200 maxout units of 5 pieces."""
    return make_gan(GeneratorConfig(model="mlp", channels=400, latent_dim=2, mlp=MlpConfig(layers=4)),
                    DiscriminatorConfig(channels=200, mlp=MlpConfig(layers=3, pieces=5)), (2,), packed)


def test_points_of_the_ring_and_the_grid() -> None:
    networks = pacgan_setting()
    assert networks["generator"](latents(7, dim=2)).shape == (7, 2)
    assert networks["discriminator"](pictures(7, (4,))).shape == (7,)
    assert parameters(networks["generator"]) == (2 + 1) * 400 + 3 * (400 + 1) * 400 + (400 + 1) * 2
    assert parameters(networks["discriminator"]) == (4 + 1) * 1000 + 2 * (200 + 1) * 1000 + 200


def test_a_maxout_unit_is_the_largest_of_its_linear_maps() -> None:
    _, d = small_gan("mlp", (3,), mlp={"layers": 1, "pieces": 4})
    (hidden,) = d.blocks  # type: ignore[misc]  # Module.__getattr__ is untyped
    points = pictures(5, (3,))
    rows = (points @ hidden.linear.weight.T + hidden.linear.bias).view(5, 4, 4)  # piece, unit
    torch.testing.assert_close(hidden(points), torch.stack([rows[:, :, unit].max(1).values for unit in range(4)], 1))


def test_many_seeds_at_once_give_what_each_gives_alone() -> None:
    """The 2-D science stacks seeds by torch.func."""
    networks = [small_gan("mlp", (2,), seed=seed, minibatch_std=4, mlp={"pieces": 3})[1] for seed in range(3)]
    weights, buffers = stack_module_state(networks)
    points = pictures(8, (2,))
    stacked = vmap(lambda p, b: functional_call(networks[0], (p, b), (points,)))(weights, buffers)
    torch.testing.assert_close(stacked, torch.stack([network(points) for network in networks]))
