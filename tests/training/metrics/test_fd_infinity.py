"""Extrapolation over 1/N: exact where the bias is exactly 1/N, and most of the bias gone where it is nearly so."""

import pytest
import torch

from data_shards.errors import UserError
from training.metrics import fd_infinity as module
from training.metrics.fd_infinity import fd_infinity
from training.metrics.frechet import Moments, frechet_from_moments, moments


def normal(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def standard(d: int) -> Moments:
    """Moments of N(0, I) itself: a reference without sampling error."""
    return Moments(10_001, torch.zeros(d, dtype=torch.float64), 10_000 * torch.eye(d, dtype=torch.float64))


def test_a_bias_of_a_over_n_is_taken_away_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_distance", lambda _reference, fake: 3.5 + 40.0 / len(fake))
    assert fd_infinity(normal(700, 4, 0), standard(4), seed=0) == pytest.approx(3.5, abs=1e-9)


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_the_true_distance_of_two_gaussians(shift: float) -> None:
    d, found, plain = 32, [], []
    for seed in range(3):
        fake = normal(2000, d, seed) + shift
        ours, theirs = moments(fake), standard(d)
        plain.append(frechet_from_moments(ours.mean, ours.cov, theirs.mean, theirs.cov) - d * shift**2)
        found.append(fd_infinity(fake, standard(d), seed=seed) - d * shift**2)
    bias = d / 2000 + d * (d + 1) / (4 * 2000)  # half of that of two samples
    assert sum(plain) / 3 == pytest.approx(bias, abs=0.05)
    assert abs(sum(found) / 3) < 0.05 < bias


def test_the_seed_is_its_own_generators() -> None:
    fake, reference = normal(200, 4, 0), standard(4)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert fd_infinity(fake, reference, seed=1) == fd_infinity(fake, reference, seed=1) != fd_infinity(fake, reference, seed=2)
    assert torch.equal(before, torch.get_rng_state())


def test_errors() -> None:
    with pytest.raises(UserError, match="at least 30"):
        fd_infinity(normal(20, 4, 0), standard(4), seed=0)
    with pytest.raises(UserError, match="points=2"):
        fd_infinity(normal(200, 4, 0), standard(4), seed=0, points=2)
    with pytest.raises(UserError, match="NaN"):
        fd_infinity(normal(200, 4, 0) * float("nan"), standard(4), seed=0)
