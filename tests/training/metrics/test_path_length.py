"""Path length against derivatives: of a known map by autograd, and of the interpolation by its angle."""

import pytest
import torch
from torch import Tensor, nn

from data_shards.errors import UserError
from training.draws import generator as draw
from training.metrics.features import FeatureNet
from training.metrics.path_length import path_length, slerp

DIM = 4


def plain_net() -> FeatureNet:
    """The pixels as features: (N, 1, 2, 2) -> (N, 4), in units of [-1, 1]."""
    return FeatureNet("pixels", "0", "none", nn.Flatten(), 2, 1, lambda x: x / 127.5 - 1, lambda x, _: x)


def test_interpolation_keeps_its_ends_and_its_speed() -> None:
    a, b = torch.randn(5, DIM, dtype=torch.float64), torch.randn(5, DIM, dtype=torch.float64)
    a, b = nn.functional.normalize(a) * 3, nn.functional.normalize(b) * 3
    torch.testing.assert_close(slerp(a, b, torch.zeros(5, 1)), a)
    torch.testing.assert_close(slerp(a, b, torch.ones(5, 1)), b)
    angle = nn.functional.cosine_similarity(a, b).acos()
    here, there = (slerp(a, b, torch.full((5, 1), at, dtype=torch.float64)) for at in (0.3, 0.3 + 1e-5))
    torch.testing.assert_close((there - here).norm(dim=1) / 1e-5, 3 * angle, rtol=1e-4, atol=1e-4)


def test_length_of_a_known_map_by_autograd() -> None:
    """|d G(z(t)) / dt|^2 at the very points that are drawn, trimmed alike."""
    weight = 0.02 * torch.randn(DIM, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def make(z: Tensor) -> Tensor:
        return torch.sin(z.double() @ weight).reshape(-1, 1, 2, 2)

    random = draw(3, "path length", 0)
    ends, t = torch.randn(2, 300, DIM, generator=random), torch.rand(300, 1, generator=random) * (1 - 1e-3)
    _, speed = torch.autograd.functional.jvp(
        lambda s: make(slerp(ends[0].double(), ends[1].double(), s)), t.double(), torch.ones_like(t, dtype=torch.float64))
    expected = speed.flatten(1).square().sum(1).sort().values[3:-3].mean()
    assert path_length(make, plain_net(), DIM, seed=3, samples=300) == pytest.approx(float(expected), rel=0.02)


def test_twice_the_map_is_four_times_the_length_and_a_constant_has_none() -> None:
    def make(scale: float) -> float:
        return path_length(lambda z: (scale * z).reshape(-1, 1, 2, 2), plain_net(), DIM, seed=0, samples=50)

    assert make(0.02) == pytest.approx(4 * make(0.01), rel=1e-2)
    assert make(0.0) == 0


def test_images_are_not_rounded() -> None:
    """A map so flat that all its images round to one: uint8 would measure 0."""
    assert path_length(lambda z: (1e-4 * z).reshape(-1, 1, 2, 2), plain_net(), DIM, seed=0, samples=50, epsilon=0.1) > 0


def test_errors() -> None:
    with pytest.raises(UserError, match="samples=1"):
        path_length(lambda z: z.reshape(-1, 1, 2, 2), plain_net(), DIM, seed=0, samples=1)
    with pytest.raises(UserError, match="not finite"):
        path_length(lambda z: torch.full((len(z), 1, 2, 2), float("nan")), plain_net(), DIM, seed=0, samples=4)
