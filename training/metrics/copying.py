"""Did the generator only copy its support images? Rates, the gallery's pairs, and the rule that disqualifies."""

import math

import numpy as np
import torch
from scipy.special import betaincinv, gammaln
from torch import Tensor

from data_shards.errors import UserError
from training.metrics.checks import as_features, as_pair
from training.metrics.likeness import Pictures, alike

_ROWS = 1024  # rows of a distance matrix held at once


def nearest_support(fake: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest support image of each fake, for the gallery of pairs.

    Args:
        fake: (N, d).
        support: (S, d).

    Returns:
        indices (N,) int64 into `support`, and Euclidean distances (N,) float64, exactly 0 for an identical row.

    Raises:
        UserError: malformed or non-finite features.
    """
    fake, support = as_pair(fake, support, ("fake", "support"))
    distances, indices = [], []
    for start in range(0, len(fake), _ROWS):
        # Differences, not the matrix-product shortcut: a true copy must come out at distance 0.
        block = torch.cdist(fake[start : start + _ROWS], support, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = block.min(dim=1)
        distances.append(nearest.values)
        indices.append(nearest.indices)
    return torch.cat(indices), torch.cat(distances)


_PLAIN_PERCENTILE_FROM = 400  # held-back images: 20 of them below the 5th percentile, a spread of 1 % of rate


def copy_threshold(support: Tensor, held_back: Tensor, percentile: float = 5.0) -> float:
    """Distance to the nearest support image below which only `percentile` percent of real images lie.

    The plain estimate, a percentile of the held-back images' distances, rests on two numbers where 40 images are held
    back. Support and held-back images are exchangeable (one pool, split at random), so below 400 held-back images every
    pool image is a query against every S-subset of the others. That average needs no random splits: with a query's
    n - 1 distances to the rest of the pool in order, d_(1) <= d_(2) <= ..., the nearest of S drawn without replacement
    is d_(j) with probability C(n-1-j, S-1) / C(n-1, S). The threshold is the weighted quantile of all distances under
    these weights: deterministic. Over 200 simulated pools (d = 32) the rate of fresh real images was, in mean, standard
    deviation and maximum, plain 0.070, 0.039, 0.220 against 0.056, 0.033, 0.170 here at 10 + 40 images, and 0.123,
    0.095, 0.514 against 0.055, 0.056, 0.338 at 10 + 10. From 400 on the plain percentile is as good, and it knows how
    the support at hand happens to lie.

    Args:
        support: (S, d).
        held_back: (H, d), real images of the same pool that no method was trained on.
        percentile: in (0, 100).

    Returns:
        The threshold, a Euclidean distance >= 0.

    Raises:
        UserError: percentile out of range, no held-back image, malformed or non-finite features.
    """
    if not 0 < percentile < 100:
        raise UserError(f"percentile={percentile} is no percentile; give one between 0 and 100, usually 5.")
    support, held_back = as_pair(support, held_back, ("support", "held-back"))
    if len(held_back) >= _PLAIN_PERCENTILE_FROM:
        return float(np.percentile(nearest_support(held_back, support)[1].cpu().numpy(), percentile))
    s, pool = len(support), torch.cat([support, held_back])
    n = len(pool)
    others = ~torch.eye(n, dtype=torch.bool, device=pool.device)
    distances = torch.cdist(pool, pool, compute_mode="donot_use_mm_for_euclid_dist")[others].reshape(n, n - 1)
    distances = distances.sort(dim=1).values[:, : n - s]  # beyond, fewer than S - 1 images lie farther: probability 0
    j = np.arange(1, n - s + 1, dtype=np.float64)
    weights = np.exp(_log_choose(n - 1 - j, s - 1) - _log_choose(np.float64(n - 1), s))  # (n - S,)
    values, order = distances.reshape(-1).sort()
    share = torch.from_numpy(weights).to(pool.device).expand(n, -1).reshape(-1)[order].cumsum(0) / n
    index = int(torch.searchsorted(share, percentile / 100.0).clamp_max(len(values) - 1))
    return float(values[index])


def copy_rate(fake: Tensor, support: Tensor, held_back: Tensor, percentile: float = 5.0,
              pictures: Pictures | None = None) -> float:
    """Share of fakes that lie nearer to a support image than only `percentile` percent of real images do.

    Held-back real images score `percentile`/100 by construction, the support images themselves 1.0. A fake at distance
    0 is a copy even where the pool holds duplicates of its own. With the pictures, a fake is a copy if its features say
    so or its pixels (`likeness.py`), each by half of the percentile.

    Args:
        fake: (N, d).
        support: (S, d), the images the method was adapted to.
        held_back: (H, d), images of the same pool that it never saw.
        percentile: in (0, 100); 5 is the field's habit.
        pictures: the pixels of the same images, in the same order.

    Returns:
        The rate in [0, 1].

    Raises:
        UserError: as `copy_threshold`.
    """
    each = percentile / 2 if pictures else percentile
    threshold = copy_threshold(support, held_back, each)
    _, distances = nearest_support(fake, support)
    copies = (distances < threshold) | (distances == 0)
    if pictures:
        if [len(part) for part in pictures] != [len(fake), len(support), len(held_back)]:
            raise UserError("Pictures and features of the copy test differ in number; give those of the same images.")
        copies |= alike(pictures, each).to(copies.device)
    return float(copies.double().mean())


def auth_pct(fake: Tensor, support: Tensor) -> float:
    """AuthPct: percentage of fakes that are authentic (authenticity, Alaa et al. 2022; so named by Stein et al. 2023).

    A fake is authentic if it lies farther from its nearest support image than that image lies from its own nearest
    fellow. A generator that copies scores about 0, and fresh real images about 50 to 90, according to S.

    Args:
        fake: (N, d).
        support: (S, d), S >= 2.

    Returns:
        A percentage in [0, 100].

    Raises:
        UserError: fewer than 2 support images, malformed or non-finite features.
    """
    support = as_features(support, "support", at_least=2)
    fellows = torch.cdist(support, support, compute_mode="donot_use_mm_for_euclid_dist")
    fellows.fill_diagonal_(math.inf)
    to_fellow = fellows.min(dim=1).values
    indices, distances = nearest_support(fake, support)
    return 100.0 * float((distances > to_fellow[indices]).double().mean())


MAX_COPY_RATE = 0.25  # see is_copier


def is_copier(copy_rate: float, n_fake: int, *, max_rate: float = MAX_COPY_RATE) -> tuple[bool, str]:
    """The one rule that disqualifies: is it beyond doubt that more than `max_rate` of the fakes are copies?

    A copier is a method whose copy rate exceeds `max_rate` by more than chance over `n_fake` images allows: the lower
    end of the one-sided 99.9 % Clopper-Pearson interval lies above it. A quarter is five times what real images score:
    of 400 simulated sets of 500 held-out reals none was caught, at 5 to 25 support and 10 to 40 held-back images, and
    of 240 sets of 50 real drawings, judged as 300 (10 + 40, features and pixels), none; copies of drawings that were
    exact, shifted 2 px, blurred, noised (sd 24 of 255) or at half contrast were caught in all of 30 cases, blends of
    two of them in 27.

    Args:
        copy_rate: in [0, 1].
        n_fake: fakes it was counted over, >= 1.
        max_rate: in [0.05, 1).

    Returns:
        (disqualified, reason); the reason is "" where it is not.

    Raises:
        UserError: arguments out of range.
    """
    if not 0 <= copy_rate <= 1 or n_fake < 1 or not 0.05 <= max_rate < 1:
        raise UserError(
            f"is_copier(copy_rate={copy_rate}, n_fake={n_fake}, max_rate={max_rate}) is out of range; "
            "give a rate in [0, 1], at least one fake and a limit in [0.05, 1)."
        )
    copies = round(copy_rate * n_fake)
    lower = float(betaincinv(copies, n_fake - copies + 1, 1e-3)) if copies else 0.0
    if lower <= max_rate:
        return False, ""
    return True, (
        f"copies its support images: {copies} of {n_fake} samples lie as near to one as only 5 % of real images do "
        f"(limit {max_rate:.0%}, reached beyond chance)"
    )


def _log_choose(n: np.ndarray | np.float64, k: int) -> np.ndarray:
    return np.asarray(gammaln(n + 1) - gammaln(k + 1.0) - gammaln(n - k + 1), dtype=np.float64)
