"""Mode collapse seen from features alone, evaluation by evaluation, and the alarm that three bad ones in a row give."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from training.metrics.checks import as_pair
from training.metrics.prdc import precision_recall_density_coverage

SPREAD = 0.5  # of the reference's mean pairwise distance, below which the fakes are too much alike
COVERAGE = 0.5  # of what a perfect sampler covers
REPEATS = 0.25  # share of fakes that have a near twin, where 1 % of reference images have
SIGNS = 2  # of the three that must be bad at once
EVALUATIONS = 3  # in a row
_PAIRS = 2000  # images of each set that pairwise distances are taken over


def collapse_signs(fake: Tensor, real: Tensor, k: int = 5) -> dict[str, float | bool]:
    """Three signs of collapse that need no labels, and whether two of them are bad.

    One sign alone is no collapse: an untrained generator covers nothing, and a smooth one has little spread.

    Args:
        fake: (N, d), N > k.
        real: (M, d), M > k.
        k: neighbours of the coverage.

    Returns:
        spread: mean pairwise distance of the fakes over that of the reals, 1 for a perfect sampler; coverage_share:
        coverage over its expectation for equal distributions (Naeem et al. 2020, lemma 2), 1 likewise; repeats: share of
        fakes whose nearest fellow is as near as that of only 1 % of as many reals, about 0.01; collapsed: whether at
        least two are beyond `SPREAD`, `COVERAGE` and `REPEATS`.

    Raises:
        UserError: malformed or non-finite features, too few images.
    """
    fake, real = as_pair(fake, real, ("fake", "real"), at_least=k + 1)
    n, m = len(fake), len(real)
    coverage = precision_recall_density_coverage(fake, real, k)["coverage"]
    expected = 1 - math.prod((m - i) / (n + m - i) for i in range(1, k + 1))
    both = min(n, m, _PAIRS)  # as many of either, since a nearest fellow is nearer among more
    of_fakes, of_reals = (_pairwise(part[:both]) for part in (fake, real))
    spread = float(of_fakes.nanmean() / of_reals.nanmean().clamp_min(1e-12))
    near = [distances.nan_to_num(math.inf).min(dim=1).values for distances in (of_fakes, of_reals)]
    repeats = float((near[0] <= torch.quantile(near[1], 0.01)).double().mean())
    bad = (spread < SPREAD) + (coverage / expected < COVERAGE) + (repeats > REPEATS)
    return {"spread": spread, "coverage_share": coverage / expected, "repeats": repeats, "collapsed": bad >= SIGNS}


def collapse_alarm(evaluations: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last `EVALUATIONS` of a run's evaluations all had the sign "collapsed"."""
    last = evaluations[-EVALUATIONS:]
    return len(last) == EVALUATIONS and all(bool(one.get("collapsed")) for one in last)


def _pairwise(x: Tensor) -> Tensor:
    """Distances of all pairs (N, N), NaN for an image with itself."""
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.fill_diagonal_(math.nan)
