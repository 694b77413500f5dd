"""How well orders mix: `python -m benchmarks.shuffle`.

A set of 24 classes is laid out in the order of its classes (nobody shuffled before packing), or in random order as
`pack_images` writes it; 96,000 samples in 96 shards. Compared over one pass:

- `graft`: its order, 24 streams, windows of 1024 samples;
- `full`: a random permutation of all samples;
- `buffer`: webdataset's way: shards in random order, then its shuffle buffer, of as many samples as all of graft's
  windows hold, 24 x 1024, and of 1,000;

both filled before the first sample leaves them, by four figures: the rank correlation of reading position and place in the
set (0 is best); the share of pairs within a batch of 64 that are from one shard; the distance in the set between neighbours
in reading order, as a share of the set (1/3 for a permutation); and how far a batch's classes are from those of the set: the
mean of chi-squared per degree of freedom (1 for a permutation).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from statistics import median

import numpy as np
from scipy.stats import spearmanr
from webdataset.filters import _shuffle

from data_shards.order import STREAMS, WINDOW, ids_at, make_order

SAMPLES, SHARDS, CLASSES, BATCH, SEEDS = 96_000, 96, 24, 64, 5


def graft(seed: int) -> np.ndarray:
    bounds = np.arange(SHARDS + 1) * (SAMPLES // SHARDS)
    return ids_at(make_order(np.arange(SAMPLES), bounds, seed), np.arange(SAMPLES))


def full(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(SAMPLES)


def buffer(size: int) -> Callable[[int], np.ndarray]:
    def order(seed: int) -> np.ndarray:
        rng = random.Random(seed)
        shards = list(range(SHARDS))
        rng.shuffle(shards)
        each = SAMPLES // SHARDS
        read = (shard * each + place for shard in shards for place in range(each))
        return np.array(list(_shuffle(read, bufsize=size, initial=size, rng=rng)))

    return order


def figures(order: np.ndarray, labels: np.ndarray) -> tuple[float, float, float, float]:
    """The four figures of the module's docstring; `order` holds places in the set, `labels` the class at each place."""
    assert np.array_equal(np.sort(order), np.arange(SAMPLES))
    rows = (order // (SAMPLES // SHARDS)).reshape(-1, BATCH)
    counts = np.apply_along_axis(np.bincount, 1, rows, minlength=SHARDS)
    same = (counts * (counts - 1)).sum() / (len(rows) * BATCH * (BATCH - 1))
    classes = np.apply_along_axis(np.bincount, 1, labels[order].reshape(-1, BATCH), minlength=CLASSES)
    expected = BATCH / CLASSES
    chi2 = ((classes - expected) ** 2 / expected).sum(1).mean() / (CLASSES - 1)
    distance = np.abs(np.diff(order)).mean() / SAMPLES
    return abs(float(spearmanr(np.arange(SAMPLES), order).statistic)), float(same), float(distance), float(chi2)


def main() -> None:
    ways = {
        f"graft, {STREAMS} streams, window {WINDOW:,}": graft,
        "full permutation": full,
        f"shards + buffer of {STREAMS * WINDOW:,}": buffer(STREAMS * WINDOW),
        "shards + buffer of 1,000": buffer(1000),
    }
    by_class = np.arange(SAMPLES) * CLASSES // SAMPLES
    print(f"{SAMPLES:,} samples, {SHARDS} shards, {CLASSES} classes; medians of {SEEDS} seeds")
    for title, packed in (("packed by class", False), ("packed in random order", True)):
        print(f"\n{title:34}{'|rank corr.|':>14}{'one shard':>12}{'neighbours':>12}{'classes chi2':>14}")
        for name, way in ways.items():
            found = []
            for seed in range(SEEDS):
                labels = np.random.default_rng(1000 + seed).permutation(by_class) if packed else by_class
                found.append(figures(way(seed), labels))
            correlation, same, distance, chi2 = (median(column) for column in zip(*found, strict=True))
            print(f"{name:34}{correlation:>14.4f}{100 * same:>10.2f} %{distance:>12.3f}{chi2:>14.2f}")


if __name__ == "__main__":
    main()
