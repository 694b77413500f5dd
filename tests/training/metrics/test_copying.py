"""A planted copier is caught, held-out real images are not."""

import pytest
import torch
from torch import Tensor

from data_shards.errors import UserError
from training.metrics.copying import auth_pct, copy_rate, copy_threshold, is_copier, nearest_support

D = 32
SPREAD = torch.exp(-2 * torch.arange(D) / D)  # unequal axes, as real features have


def images(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, D, generator=generator) * SPREAD


def copies(support: Tensor, n: int, jitter: float, generator: torch.Generator) -> Tensor:
    rows = torch.randint(len(support), (n,), generator=generator)
    return support[rows] + jitter * torch.randn(n, D, generator=generator) * SPREAD


def test_rates_at_both_ends() -> None:
    generator = torch.Generator().manual_seed(0)
    support, held_back = images(10, generator), images(40, generator)
    assert copy_rate(support, support, held_back) == 1.0
    assert copy_rate(held_back + 100, support, held_back) == 0.0


@pytest.mark.parametrize(("shots", "held_back"), [(10, 40), (25, 25), (20, 500)])
def test_held_out_reals_are_five_percent_on_average_and_hardly_ever_disqualified(shots: int, held_back: int) -> None:
    generator = torch.Generator().manual_seed(1)
    rates, caught = [], 0
    for _ in range(200):
        support, rest, fresh = (images(n, generator) for n in (shots, held_back, 500))
        rates.append(copy_rate(fresh, support, rest))
        caught += is_copier(rates[-1], 500)[0]
    assert sum(rates) / 200 == pytest.approx(0.05, abs=0.012)
    assert caught == 0


@pytest.mark.parametrize("n_fake", [32, 64, 500])
def test_a_copier_with_jitter_is_always_disqualified(n_fake: int) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(200):
        support, rest = images(10, generator), images(40, generator)
        rate = copy_rate(copies(support, n_fake, 0.1, generator), support, rest)
        caught, reason = is_copier(rate, n_fake)
        assert caught and "copies" in reason


def test_half_a_copier_is_disqualified_too() -> None:
    generator = torch.Generator().manual_seed(3)
    support, rest = images(10, generator), images(40, generator)
    mixed = torch.cat([copies(support, 250, 0.1, generator), images(250, generator)])
    rate = copy_rate(mixed, support, rest)
    assert 0.45 < rate < 0.7 and is_copier(rate, 500)[0]


def test_threshold_is_the_mean_over_all_splits() -> None:
    """Against the plain way: draw many splits of the pool, and pool their nearest distances."""
    generator = torch.Generator().manual_seed(4)
    pool = images(12, generator).double()
    distances = []
    for _ in range(2000):
        order = torch.randperm(12, generator=generator)
        distances.append(nearest_support(pool[order[4:]], pool[order[:4]])[1])
    sampled = torch.quantile(torch.cat(distances), torch.tensor([0.2, 0.5], dtype=torch.float64))
    found = [copy_threshold(pool[:4], pool[4:], percentile) for percentile in (20.0, 50.0)]
    assert found == pytest.approx(sampled.tolist(), rel=0.03)


def test_an_exact_copy_counts_even_among_duplicates() -> None:
    support = torch.zeros(5, 2)
    held_back = torch.zeros(20, 2)
    assert copy_rate(support, support, held_back) == 1.0
    assert copy_rate(support + 1, support, held_back) == 0.0


def test_authenticity() -> None:
    generator = torch.Generator().manual_seed(5)
    support = images(50, generator)
    assert auth_pct(copies(support, 200, 0.01, generator), support) == 0.0
    assert 30 < auth_pct(images(500, generator), support) < 90
    assert auth_pct(support + 100, support) == 100.0


def test_nearest_support_by_hand() -> None:
    indices, distances = nearest_support(torch.tensor([[0.0, 1.0], [5.0, 4.0]]), torch.tensor([[5.0, 0.0], [0.0, 1.0]]))
    assert indices.tolist() == [1, 0]
    assert distances.tolist() == [0.0, 4.0]


@pytest.mark.parametrize("kwargs", [{"copy_rate": 1.5, "n_fake": 10}, {"copy_rate": 0.5, "n_fake": 0}])
def test_rule_refuses_nonsense(kwargs: dict) -> None:
    with pytest.raises(UserError, match="out of range"):
        is_copier(**kwargs)


def test_errors() -> None:
    with pytest.raises(UserError, match="percentile=0"):
        copy_threshold(torch.zeros(3, 2), torch.zeros(3, 2), 0)
    with pytest.raises(UserError, match="held-back"):
        copy_rate(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(0, 2))
    with pytest.raises(UserError, match="at least 2"):
        auth_pct(torch.zeros(3, 2), torch.zeros(1, 2))
