"""KID against hand calculations and torchmetrics, and the coverage of its interval."""

import math

import pytest
import torch
from torchmetrics.image.kid import poly_mmd

from data_shards.errors import UserError
from training.metrics import kid as kid_module
from training.metrics.kid import kid, kid_interval


def normal(n: int, d: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def test_kid_by_hand() -> None:
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    assert kid(x, y) == 1 + 27 - 2 * 9.25 == 9.5
    assert kid(y, x) == 9.5


@pytest.mark.parametrize("n", [10, 50, 100])
def test_kid_of_one_distribution_is_zero_on_average(n: int) -> None:
    values = torch.tensor([kid(normal(n, 64, 2 * s), normal(n, 64, 2 * s + 1)) for s in range(200)])
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(200)
    assert values.min() < 0  # unbiased, so it must be able to go below


def test_kid_agrees_with_torchmetrics_on_all_pairs() -> None:
    x, y = normal(300, 32, 0, 0.3).double(), normal(300, 32, 1).double()
    k_xx, k_yy, k_xy = ((a @ b.T / 32 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    from torchmetrics.image.kid import maximum_mean_discrepancy

    assert kid(x, y) == pytest.approx(float(maximum_mean_discrepancy(k_xx, k_xy, k_yy)), rel=1e-9)
    assert kid(x.float(), y.float()) == pytest.approx(float(poly_mmd(x.float(), y.float())), rel=1e-5)


def test_kid_in_blocks_is_kid(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(123, 8, 0, 0.1), normal(77, 8, 1)
    whole = kid(x, y), kid_interval(x, y, seed=3)
    monkeypatch.setattr(kid_module, "_ROWS", 10)
    assert (kid(x, y), *kid_interval(x, y, seed=3)) == pytest.approx((whole[0], *whole[1]), rel=1e-9)


def test_kid_falls_as_more_of_the_right_data_is_mixed_in() -> None:
    real, right, wrong = normal(400, 16, 0), normal(400, 16, 1), normal(400, 16, 2, 1.0)
    values = [kid(torch.cat([right[:k], wrong[k:]]), real) for k in range(0, 401, 80)]
    assert values == sorted(values, reverse=True) and len(set(values)) == len(values)


def population_kid(d: int, shift: float) -> float:
    """KID of N(shift, I) against N(0, I) in closed form, from the moments of x.y: E (z + 1)^3."""

    def mean_kernel(a: float, b: float) -> float:  # x ~ N(a 1, I), y ~ N(b 1, I), z = x.y / d
        # z = (1/d) sum of d independent products u = x_i y_i, of which the first three cumulants are known.
        m1 = a * b
        m2 = (a * a + 1) * (b * b + 1)
        m3 = (a**3 + 3 * a) * (b**3 + 3 * b)
        k1, k2, k3 = m1, (m2 - m1**2) / d, (m3 - 3 * m2 * m1 + 2 * m1**3) / d**2
        e1, e2, e3 = k1, k2 + k1**2, k3 + 3 * k2 * k1 + k1**3
        return e3 + 3 * e2 + 3 * e1 + 1

    return mean_kernel(shift, shift) + mean_kernel(0, 0) - 2 * mean_kernel(shift, 0)


def test_population_kid_of_the_table() -> None:
    assert population_kid(1, 1.0) == pytest.approx(22)
    assert kid(normal(2000, 16, 0, 0.5), normal(2000, 16, 1)) == pytest.approx(population_kid(16, 0.5), rel=0.1)


@pytest.mark.parametrize(("d", "shift"), [(64, 0.0), (16, 0.1), (64, 0.3)])
def test_interval_covers_the_truth(d: int, shift: float) -> None:
    """Nominal 95 %; three further standard errors of 1,000 simulations are 2 %, and the band asked for is 93 to 99 %.

    (64, 0.0) is the degenerate case, where the naive bootstrap covers 0 % and one without self-pairs 100 %.
    """
    truth, generator, covered = population_kid(d, shift), torch.Generator().manual_seed(5), 0
    for seed in range(1000):
        fake = torch.randn(100, d, generator=generator) + shift
        real = torch.randn(50, d, generator=generator)
        low, high = kid_interval(fake, real, seed=seed, resamples=200)
        covered += low <= truth <= high
    assert 930 <= covered <= 990


def test_interval_is_seeded_by_its_own_generator() -> None:
    x, y = normal(60, 8, 0), normal(40, 8, 1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert kid_interval(x, y, seed=1) == kid_interval(x, y, seed=1) != kid_interval(x, y, seed=2)
    assert torch.equal(before, torch.get_rng_state())


def test_interval_narrows_with_data_and_widens_with_level() -> None:
    def width(n: int, level: float) -> float:
        low, high = kid_interval(normal(n, 8, 0, 0.5), normal(n, 8, 1), seed=0, level=level)
        return high - low

    assert width(400, 0.95) < 0.7 * width(100, 0.95)
    assert width(100, 0.99) > width(100, 0.95) > width(100, 0.5)


def test_interval_of_large_sets_takes_the_normal_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(400, 64, 0), normal(400, 64, 1)
    exact = kid_interval(x, y, seed=0, resamples=4000)
    monkeypatch.setattr(kid_module, "_EXACT_PAIRS", 10)
    limit = kid_interval(x, y, seed=0, resamples=4000)
    assert limit == pytest.approx(exact, abs=0.15 * (exact[1] - exact[0]))


@pytest.mark.parametrize(
    ("fake", "real", "words"),
    [
        (torch.zeros(3), torch.zeros(5, 2), "shape"),
        (torch.zeros(1, 2), torch.zeros(5, 2), "at least 2"),
        (torch.zeros(5, 3), torch.zeros(5, 2), "same feature net"),
        (torch.full((5, 2), math.nan), torch.zeros(5, 2), "NaN"),
        (torch.zeros(5, 2), torch.full((5, 2), math.inf), "real"),
    ],
)
def test_bad_features_are_refused(fake: torch.Tensor, real: torch.Tensor, words: str) -> None:
    with pytest.raises(UserError, match=words):
        kid(fake, real)


def test_bad_interval_arguments_are_refused() -> None:
    with pytest.raises(UserError, match="resamples=5"):
        kid_interval(torch.zeros(9, 2), torch.zeros(9, 2), seed=0, resamples=5)
    with pytest.raises(UserError, match="level=1"):
        kid_interval(torch.zeros(9, 2), torch.zeros(9, 2), seed=0, level=1.0)
