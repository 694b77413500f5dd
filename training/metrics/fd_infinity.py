"""Fréchet distance of infinitely many generated images, by extrapolation over 1/N (Chong and Forsyth 2020)."""

import numpy as np
import torch
from torch import Tensor

from data_shards.errors import UserError
from training.metrics.checks import as_features
from training.metrics.frechet import Moments, frechet_from_moments, moments

POINTS = 15  # as in the paper
SMALLEST = 0.2  # smallest subset, as a share of the fakes


def fd_infinity(fake: Tensor, reference: Moments, *, seed: int, points: int = POINTS, smallest: float = SMALLEST) -> float:
    """Intercept of the least-squares line through the distances of subsets of N fakes over 1/N (section 3.2).

    The bias of the Fréchet distance goes as 1/N with a slope that depends on the generator (section 3.1), so that two
    generators cannot be compared even at equal N; the intercept takes the fakes' share of it away. The share of the
    reference remains: it is the same for all generators that are scored against one reference. The line is one only
    where N is several times the dimension d of the features; below that the intercept is too low.

    Args:
        fake: (N, d), at least 2 * `points` images.
        reference: moments of at least 2 real images.
        seed: of the subsets' own generator.
        points: sizes of subsets, evenly spaced from `smallest` * N to N, >= 3.
        smallest: in (0, 1).

    Returns:
        The extrapolated distance; noise can put it slightly below 0.

    Raises:
        UserError: malformed or non-finite features, too few images, arguments out of range.
    """
    if points < 3 or not 0 < smallest < 1:
        raise UserError(f"points={points} and smallest={smallest} make no line; give at least 3 and a share such as 0.2.")
    fake = as_features(fake, "fake", at_least=2)
    if len(fake) * smallest < 2 or len(fake) < 2 * points:
        raise UserError(f"{len(fake)} generated images are too few to extrapolate over; generate at least {2 * points}.")
    rng = np.random.default_rng(seed)
    sizes = np.linspace(smallest * len(fake), len(fake), points).round().astype(int)
    distances = [_distance(reference, fake[torch.from_numpy(rng.permutation(len(fake))[:size])]) for size in sizes]
    _, intercept = np.polyfit(1 / sizes, distances, 1)
    return float(intercept)


def _distance(reference: Moments, fake: Tensor) -> float:
    subset = moments(fake)
    return frechet_from_moments(reference.mean, reference.cov, subset.mean, subset.cov)
