"""Which source suits a target: distances between sets, and how well they foretold the gains that transfer had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from data_shards import ShardSet
from data_shards.errors import UserError
from training.draws import generator
from training.metrics.extraction import MapFn, set_features
from training.metrics.features import FeatureNet
from training.metrics.frechet import frechet_distance
from training.metrics.kid import kid, kid_interval

LEAST = 4  # images of a set, which KID's interval needs


def some_images(images: ShardSet, limit: int, seed: int) -> np.ndarray:
    """The ids of at most ``limit`` images of the training split, drawn at random, in order.

    A target's training split is its support pool: what a final score is taken against is not looked at to choose a source.
    """
    ids = images.indices("train")
    order = torch.randperm(len(ids), generator=generator(seed, "compared images", 0))[:limit]
    return np.sort(ids[order.numpy()])


def set_distance(source: ShardSet, target: ShardSet, net: FeatureNet, *, limit: int, seed: int,
                 map_fn: MapFn = map) -> dict[str, Any]:
    """How far the source's images lie from the target's in a net's features.

    Returns:
        kid with kid_ci95, the Frechet distance fd at the smaller set's count (it is biased by the count), and the counts.

    Raises:
        UserError: for a set of fewer than 4 images.
    """
    ids = {"source": some_images(source, limit, seed), "target": some_images(target, limit, seed)}
    for images, chosen in ((source, ids["source"]), (target, ids["target"])):
        if len(chosen) < LEAST:
            raise UserError(f"the set {images.place} has {len(chosen)} training images, and a distance needs {LEAST}; "
                            "pack more.")
    near, far = (set_features(each.place, ids[name], net, map_fn) for name, each in (("target", target), ("source", source)))
    count = min(len(near), len(far))
    return {"kid": kid(far, near), "kid_ci95": list(kid_interval(far, near, seed=seed)),
            "fd": frechet_distance(far[:count], near[:count]), "n_source": len(far), "n_target": len(near)}


def rank_correlation(distances: Sequence[float], gains: Sequence[float]) -> float | None:
    """Spearman's correlation of nearness (minus distance) with the gain over scratch: 1 where the nearer source always gained
    more; None for fewer than three sources, or where all are alike."""
    if len(gains) < 3 or len(set(gains)) < 2 or len(set(distances)) < 2:
        return None
    return float(spearmanr([-distance for distance in distances], gains).statistic)


def mean_ranks(values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Each source's rank, 1 for the smallest value, averaged over the measures: measure -> source -> value."""
    ranks: dict[str, list[int]] = {}
    for found in values.values():
        for rank, name in enumerate(sorted(found, key=lambda name: found[name]), 1):
            ranks.setdefault(name, []).append(rank)
    return {name: sum(each) / len(each) for name, each in ranks.items()}
