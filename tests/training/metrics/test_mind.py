"""MIND against its closed forms and against scipy's one-dimensional optimal transport."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from data_shards.errors import UserError
from training.metrics.mind import _w2_squared, mind


def normal(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_shift_of_every_feature() -> None:
    """The same sample shifted: each projection is shifted by u . (mu, ..., mu), whose mean square is mu^2."""
    x, mu, d = normal(500, 16, 0), 0.5, 16
    assert mind(x + mu, x, seed=0, directions=4000) == pytest.approx(3 * d * mu**2, rel=0.05)
    fresh = mind(normal(4000, d, 1) + mu, normal(4000, d, 2), seed=0)
    assert fresh == pytest.approx(3 * d * mu**2, rel=0.1)


def test_a_scale_in_one_dimension() -> None:
    x = normal(300, 1, 0)
    assert mind(2 * x, x, seed=0) == pytest.approx(3 * float(x.square().mean()))
    assert mind(x, x[torch.randperm(300)], seed=0) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("n", "m"), [(7, 7), (6, 9), (5, 8), (2, 3)])
def test_one_dimension_is_an_assignment_problem(n: int, m: int) -> None:
    """Each point repeated until both sets have lcm(n, m) points; the best assignment of equal weights is W_2^2."""
    x, y = normal(n, 3, n), normal(m, 3, 10 + m)
    both = np.lcm(n, m)
    for column, found in enumerate(_w2_squared(x, y).tolist()):
        a, b = (np.repeat(part[:, column].numpy(), both // len(part)) for part in (x, y))
        cost = (a[:, None] - b[None]) ** 2
        rows, columns = linear_sum_assignment(cost)
        assert found == pytest.approx(cost[rows, columns].mean(), rel=1e-12)


def test_directions_are_seeded_by_their_own_generator() -> None:
    x, y = normal(50, 8, 0), normal(60, 8, 1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert mind(x, y, seed=1, directions=20) == mind(x, y, seed=1, directions=20) != mind(x, y, seed=2, directions=20)
    assert torch.equal(before, torch.get_rng_state())
    assert mind(x, y, seed=1, directions=20) == pytest.approx(mind(y, x, seed=1, directions=20))


def test_errors() -> None:
    with pytest.raises(UserError, match="directions=0"):
        mind(normal(9, 2, 0), normal(9, 2, 1), seed=0, directions=0)
    with pytest.raises(UserError, match="same feature net"):
        mind(normal(9, 2, 0), normal(9, 3, 1), seed=0)
