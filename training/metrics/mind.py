"""MIND: sliced 2-Wasserstein distance of features (Berthet et al. 2026, "Monge Inception Distance", arXiv:2605.06797)."""

import numpy as np
import torch
from torch import Tensor

from data_shards.errors import UserError
from training.metrics.checks import as_pair

DIRECTIONS = 1000
_AT_ONCE = 64  # directions projected on at once


def mind(fake: Tensor, real: Tensor, *, seed: int, directions: int = DIRECTIONS) -> float:
    """3 d times the mean over random unit directions u of W_2^2 between the two sets' projections on u.

    In one dimension optimal transport pairs the sorted values, so each W_2^2 is the integral of the squared difference
    of the two quantile functions, exact here for sets of unlike size too. With the factor 3 d a shift of all d features
    by mu gives 3 d mu^2. No Gaussian is assumed and no covariance estimated; it is still biased upwards for few images
    (two samples of one distribution do not score 0), so compare at equal counts.

    Args:
        fake: (N, d), N >= 2.
        real: (M, d), M >= 2.
        seed: of the directions' own generator; the same seed gives the same directions.
        directions: >= 1.

    Returns:
        The distance, >= 0.

    Raises:
        UserError: malformed or non-finite features, no direction.
    """
    if directions < 1:
        raise UserError(f"directions={directions} project on nothing; give at least 1, usually {DIRECTIONS}.")
    fake, real = as_pair(fake, real, ("fake", "real"), at_least=2)
    d = fake.shape[1]
    drawn = np.random.default_rng(seed).standard_normal((directions, d))
    unit = torch.from_numpy(drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).to(fake.device)
    total = sum(float(_w2_squared(fake @ u.T, real @ u.T).sum()) for u in unit.split(_AT_ONCE))
    return 3 * d * total / directions


def _w2_squared(x: Tensor, y: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance between the columns of x (N, k) and of y (M, k): (k,)."""
    n, m = len(x), len(y)
    x, y = x.sort(dim=0).values, y.sort(dim=0).values
    # Both quantile functions are constant between neighbouring multiples of 1/n and 1/m; counted in units of 1/(n m).
    ends = torch.unique(torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]))
    widths = torch.diff(ends, prepend=ends.new_zeros(1)).to(x) / (n * m)
    rows_x, rows_y = ((ends - 1) // m).to(x.device), ((ends - 1) // n).to(x.device)
    return (widths[:, None] * (x[rows_x] - y[rows_y]).square()).sum(dim=0)
