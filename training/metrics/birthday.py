"""Birthday test: how many different images does a generator have, judged by how often two are alike (Arora and Zhang 2017)?"""

import math

import torch
from torch import Tensor

from training.metrics.checks import as_pair

MOST = 5000  # images of either set whose pairs are looked at
HALF = math.sqrt(2 * math.log(2))  # 1.177: HALF * sqrt(S) of S equally likely images repeat one in half of all cases


def birthday_support(fake: Tensor, real: Tensor) -> dict[str, float | None]:
    """Support size from the share of generated pairs that are alike; a pair is, if it is nearer than any real pair.

    Of S equally likely images two are the same with probability 1/S, and the paper's batch that holds a pair in half of all
    cases is 1.177 sqrt(S). All pairs are counted here, which needs fewer images than counting batches. For unlike
    probabilities S is the effective number 1 / sum p^2.

    Args:
        fake: (N, d), N >= 2.
        real: (M, d), M >= 2: its nearest pair sets the threshold (0 where it holds duplicates: then only identical
            features are alike).

    Returns:
        birthday_support: estimate of S, and birthday_batch: 1.177 sqrt(S); both None where no pair is alike, which says S is
        over about N^2 / 6 with 95 % confidence (rule of three).

    Raises:
        UserError: malformed or non-finite features, fewer than 2 images.
    """
    fake, real = as_pair(fake[:MOST], real[:MOST], ("fake", "real"), at_least=2)
    threshold = float(_pair_distances(real).min())
    alike = int((_pair_distances(fake) <= threshold).sum())
    support = len(fake) * (len(fake) - 1) / 2 / alike if alike else None
    return {"birthday_support": support, "birthday_batch": HALF * math.sqrt(support) if support else None}


def _pair_distances(x: Tensor) -> Tensor:
    """Euclidean distances of all pairs, exactly 0 for identical rows: (N (N - 1) / 2,)."""
    return torch.nn.functional.pdist(x.cpu())
