"""Episodes for meta-learning: disjoint support and query sets, drawn by seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_shards.errors import UserError
from data_shards.manifest import ShardSet


def episode(
    shard_set: ShardSet,
    *,
    label: int | str | Sequence[int | str] | None,
    shots: int,
    queries: int,
    seed: int,
    split: str = "train",
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a support set of `shots` and a query set of `queries` sample ids, disjoint, from one class, from the whole
    domain (None), or so many from each of several classes, in their order.

    The same arguments give the same episode, and a class gives the same samples alone and among others. Raises
    `UserError` if a class has fewer than shots + queries images or is named twice.
    """
    if shots < 0 or queries < 0 or seed < 0:
        raise UserError(f"shots {shots}, queries {queries} and seed {seed} must be >= 0")
    labels: list[int | str | None] = [label] if label is None or isinstance(label, int | str) else list(label)
    numbers = [0 if one is None else 1 + shard_set.label_index(one) for one in labels]
    if len(set(numbers)) < len(numbers):
        raise UserError(f"the classes {labels} name one twice; name each once")
    drawn = []
    for one, number in zip(labels, numbers, strict=True):
        ids = shard_set.indices(split, one)
        if shots + queries > len(ids):
            raise UserError(
                f"{shots} shots and {queries} queries need {shots + queries} images, and {shard_set.manifest.name} has"
                f" {len(ids)} of {'any class' if one is None else f'class {one!r}'} in its split {split}; ask for fewer"
            )
        bits = np.random.PCG64(np.random.SeedSequence((seed, number))).random_raw(len(ids))
        drawn.append(ids[np.argsort(bits, kind="stable")[: shots + queries]])
    none = np.empty(0, np.int64)
    return np.concatenate([none, *(ids[:shots] for ids in drawn)]), np.concatenate([none, *(ids[shots:] for ids in drawn)])
