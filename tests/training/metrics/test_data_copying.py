"""C_T: a planted copier far below 0, an underfitted generator far above, fresh real images about a standard normal."""

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from data_shards.errors import UserError
from training.metrics.data_copying import _mann_whitney_z, data_copying_statistic


def normal(n: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


def test_the_sign_says_copying_or_underfitting() -> None:
    training, held_out = normal(300, 0), normal(300, 1)
    copies = training.repeat(2, 1)[:400] + normal(400, 2, 0.05)
    assert data_copying_statistic(copies, training, held_out, seed=0) < -5
    assert data_copying_statistic(normal(400, 3, 1.5), training, held_out, seed=0) > 3
    half = torch.cat([copies[:200], normal(200, 4)])
    assert data_copying_statistic(half, training, held_out, seed=0) < -2


def test_fresh_images_score_about_zero() -> None:
    one_cell = [data_copying_statistic(normal(60, 3 * s), normal(60, 3 * s + 1), normal(60, 3 * s + 2), seed=s, cells=1)
                for s in range(60)]
    assert abs(np.mean(one_cell)) < 0.5 and 0.7 < np.std(one_cell) < 1.4


def test_z_is_mann_whitneys() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal(40), rng.standard_normal(50) + 0.3
    u = mannwhitneyu(x, y).statistic
    assert _mann_whitney_z(x, y) == pytest.approx((u - 1000) / np.sqrt(40 * 50 * 91 / 12))
    assert _mann_whitney_z(np.zeros(5), np.zeros(9)) == 0


def test_cells_find_a_copier_of_one_half_of_the_space() -> None:
    """Copies in one place, too wide in the other: the weighted mean of the cells is that of each cell apart."""
    offset = torch.tensor([100.0] + [0.0] * 7)
    training, held_out = (torch.cat([normal(100, s), normal(100, s + 1) + offset]) for s in (0, 10))
    left, right = training[:100] + normal(100, 20, 0.02), normal(100, 21, 2.0) + offset
    both = data_copying_statistic(torch.cat([left, right]), training, held_out, seed=0, cells=2)
    apart = [data_copying_statistic(left, training[:100], held_out[:100], seed=0, cells=1),
             data_copying_statistic(right, training[100:], held_out[100:], seed=0, cells=1)]
    assert apart[0] < -5 < 5 < apart[1] and both == pytest.approx(sum(apart) / 2)


def test_errors() -> None:
    far = normal(40, 1) + 1000
    with pytest.raises(UserError, match="cells=1"):
        data_copying_statistic(far, torch.cat([normal(40, 2), far]), normal(40, 3), seed=0, cells=2)
    with pytest.raises(UserError, match="at least 2"):
        data_copying_statistic(normal(40, 1), normal(1, 2), normal(40, 3), seed=0)
