"""Precision, recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020)."""

import torch
from torch import Tensor

from data_shards.errors import UserError
from training.metrics.checks import as_pair


def precision_recall_density_coverage(fake: Tensor, real: Tensor, k: int = 5) -> dict[str, float]:
    """How much of the fake set looks real, and how much of the real set is reached.

    Around each sample lies a ball that reaches to its k-th nearest neighbour in its own set (itself not counted).
    precision: share of fakes inside some real ball; recall: share of reals inside some fake ball (Kynkaanniemi et al.
    2019, eq. 2); density: real balls per fake, over k; coverage: share of real balls that hold a fake (both Naeem et
    al. 2020, section 3).

    The order of the arguments matters: swapped, precision and recall change places.

    Args:
        fake: (N, d), N > k.
        real: (M, d), M > k.
        k: neighbours, >= 1.

    Returns:
        precision, recall, coverage in [0, 1]; density >= 0, and 1 in expectation for equal distributions. There,
        coverage is 1 - prod_{i=1..k} (M - i)/(N + M - i) in expectation (0.97 at N = M = 200, k = 5), not 1.

    Raises:
        UserError: k below 1, a set with k images or fewer, malformed or non-finite features.
    """
    if k < 1:
        raise UserError(f"k={k} neighbours make no ball; give k of 1 or more.")
    fake, real = as_pair(fake, real, ("fake", "real"), at_least=k + 1)
    real_radius, fake_radius = _radii(real, k), _radii(fake, k)  # (M,), (N,)
    fake_is_real = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    real_is_reached = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    balls = 0
    for start in range(0, len(fake), _ROWS):
        rows = slice(start, start + _ROWS)
        distances = torch.cdist(fake[rows], real)  # (rows, M)
        inside_real = distances < real_radius
        fake_is_real[rows] = inside_real.any(dim=1)
        covered |= inside_real.any(dim=0)
        balls += int(inside_real.sum())
        real_is_reached |= (distances < fake_radius[rows, None]).any(dim=0)
    return {
        "precision": float(fake_is_real.double().mean()),
        "recall": float(real_is_reached.double().mean()),
        "density": balls / (k * len(fake)),
        "coverage": float(covered.double().mean()),
    }


_ROWS = 2048  # rows of a distance matrix held at once: 50,000 x 2048 in float64 is 0.8 GB


def _radii(x: Tensor, k: int) -> Tensor:
    """Distance of each row of x (N, d) to its k-th nearest other row: (N,)."""
    parts = []
    for start in range(0, len(x), _ROWS):
        distances = torch.cdist(x[start : start + _ROWS], x)
        index = torch.arange(len(distances), device=x.device)
        distances[index, start + index] = 0.0  # exact, where cdist's matrix product leaves a rounding
        parts.append(distances.kthvalue(k + 1, dim=1).values)
    return torch.cat(parts)
