"""What is read: a set, some of its samples, or several such parts mixed by weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_shards.errors import UserError
from data_shards.manifest import ShardSet


@dataclass(frozen=True, eq=False)
class Part:
    """What one source gives to a mixture: a set's split, or those samples of it, and its share relative to the others."""

    shard_set: ShardSet
    weight: float = 1.0
    split: str = "train"
    subset: np.ndarray | None = None  # sample ids


def class_parts(
    shard_set: ShardSet, weights: Mapping[str, float] | None = None, *, split: str = "train"
) -> list[Part]:
    """One part per class: with the weight that `weights` gives its name (others are left out), or all alike (None), so
    that every class is seen equally often however many images it has.

    Raises `UserError` for an unknown class, or a set without classes.
    """
    classes = shard_set.manifest.classes
    if not classes:
        raise UserError(f"set {shard_set.manifest.name} has no classes to weigh; pack it with labels")
    chosen = dict.fromkeys(classes, 1.0) if weights is None else dict(weights)
    found = [(weight, shard_set.indices(split, name)) for name, weight in chosen.items()]
    return [Part(shard_set, weight, split, ids) for weight, ids in found if len(ids) or weights is not None]


def class_names(parts: Sequence[Part]) -> tuple[str, ...]:
    """What the labels of a mixture's batches count: the classes of its sets, under their set's name where sets differ."""
    sets = distinct_sets(parts)
    if len({one.manifest.classes for one in sets}) == 1:
        return sets[0].manifest.classes
    return tuple(f"{one.manifest.name}/{name}" for one in sets for name in one.manifest.classes)


def labels_of(parts: Sequence[Part], numbers: np.ndarray, ids: np.ndarray) -> np.ndarray:
    labels = gather(parts, numbers, ids, "label").astype(np.int64)
    classes = [one.manifest.classes for one in distinct_sets(parts)]
    if any(names != classes[0] for names in classes):
        first = np.cumsum([0, *map(len, classes)])[set_numbers(parts)]
        labels = np.where(labels < 0, labels, labels + first[numbers])
    return labels


def gather(parts: Sequence[Part], numbers: np.ndarray, ids: np.ndarray, column: str) -> np.ndarray:
    sets, of_set = distinct_sets(parts), set_numbers(parts)[numbers]
    if len(sets) == 1:
        return sets[0].samples[column][ids]
    found = {number: sets[number].samples[column][ids[of_set == number]] for number in np.unique(of_set).tolist()}
    result = np.empty(len(ids), np.result_type(*(values.dtype for values in found.values())))
    for number, values in found.items():
        result[of_set == number] = values
    return result


def distinct_sets(parts: Sequence[Part]) -> list[ShardSet]:
    return list({id(part.shard_set): part.shard_set for part in parts}.values())


def set_numbers(parts: Sequence[Part]) -> np.ndarray:
    """For each part, the number of its set among `_distinct`."""
    sets = [id(one) for one in distinct_sets(parts)]
    return np.array([sets.index(id(part.shard_set)) for part in parts])


def check_shapes(parts: Sequence[Part]) -> None:
    if not parts:
        raise UserError("a mixture needs at least one part; give a set")
    first = parts[0].shard_set.manifest
    for manifest in (part.shard_set.manifest for part in parts):
        if manifest.image_shape != first.image_shape:
            raise UserError(
                f"sets {first.name} {first.image_shape} and {manifest.name} {manifest.image_shape} differ in shape and"
                " cannot be mixed; pack one of them again with the other's --size and --channels"
            )


def chosen_ids(part: Part) -> np.ndarray:
    shard_set, subset = part.shard_set, part.subset
    ids = shard_set.indices(part.split)
    if subset is not None:
        subset = np.asarray(subset, np.int64)
        if not np.isin(subset, ids).all():
            raise UserError(
                f"the subset holds sample ids that are not in split {part.split!r} of {shard_set.manifest.name}"
            )
        ids = np.unique(subset)
    if len(ids) == 0:
        raise UserError(
            f"split {part.split!r} of {shard_set.manifest.name} holds no image; choose another or pack it again"
        )
    return ids
