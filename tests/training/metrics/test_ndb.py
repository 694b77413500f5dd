"""NDB: the test's level for a perfect sampler, every bin for one that lacks half of the modes, the z-test by hand."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from data_shards.errors import UserError
from training.metrics.ndb import ndb


def blobs(n: int, modes: int, seed: int, kept: int | None = None) -> torch.Tensor:
    """Points of `modes` well separated blobs in 4-D, of which the first `kept` occur."""
    rng = np.random.default_rng(seed)
    centres = 50 * np.random.default_rng(99).standard_normal((modes, 4))
    return torch.from_numpy(centres[rng.integers(kept or modes, size=n)] + rng.standard_normal((n, 4)))


def test_a_perfect_sampler_scores_the_level() -> None:
    shares = [ndb(blobs(2000, 20, 2 * s), blobs(4000, 20, 2 * s + 1), seed=s, bins=20)["ndb_share"] for s in range(25)]
    assert np.mean(shares) == pytest.approx(0.05, abs=0.03)  # 500 tests
    fine = [ndb(blobs(2000, 5, 2 * s), blobs(4000, 5, 2 * s + 1), seed=s)["ndb_share"] for s in range(5)]
    assert np.mean(fine) == pytest.approx(0.05, abs=0.03)  # 500 tests, bins that cut through the modes


def test_half_of_the_modes_missing() -> None:
    found = ndb(blobs(2000, 20, 0, kept=10), blobs(4000, 20, 1), seed=0, bins=20)
    assert found["ndb_share"] == 1.0
    # Half of the mass on twice the density: JS = 0.5 ln(4/3) + 0.5 (0.5 ln(2/3) + 0.5 ln 2).
    assert found["ndb_js"] == pytest.approx(0.5 * np.log(4 / 3) + 0.25 * (np.log(2 / 3) + np.log(2)), abs=0.01)


def test_the_z_test_by_hand() -> None:
    """Two bins, the fakes 70 and 30, the reference 100 and 100: p = 170/300, z = 0.2 / sqrt(p (1 - p) (1/100 + 1/200))."""
    real = torch.cat([torch.zeros(100, 1), torch.ones(100, 1)])
    fake = torch.cat([torch.zeros(70, 1), torch.ones(30, 1)])
    p = 170 / 300
    exact = 2 * float(norm.sf(0.2 / np.sqrt(p * (1 - p) * (1 / 100 + 1 / 200))))
    assert ndb(fake, real, seed=3, bins=2, alpha=1.001 * exact)["ndb_share"] == 1.0
    assert ndb(fake, real, seed=3, bins=2, alpha=0.999 * exact)["ndb_share"] == 0.0


def test_errors() -> None:
    with pytest.raises(UserError, match="at least 40"):
        ndb(blobs(50, 2, 0), blobs(39, 2, 1), seed=0)
