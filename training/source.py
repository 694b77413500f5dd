"""Where the recipe's sets lie, and what pretraining reads of them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from data_shards import Part, ShardSet, class_parts, open_set
from data_shards.errors import UserError
from training.config import content_id
from training.draws import generator

if TYPE_CHECKING:
    from training.recipe import DataConfig, RecipeT, TrainingRecipe


@functools.lru_cache(maxsize=64)
def open_cached(place: str) -> ShardSet:
    """A set, opened once in each process."""
    return open_set(place)


def set_place(data: DataConfig, name: str) -> str:
    """The absolute path or the URL of a set that the recipe names: a URL, a path, or a folder below ``data.root``."""
    if "://" in name:
        return name
    if "://" in data.root and not Path(name).is_absolute():
        return f"{data.root.rstrip('/')}/{name}"
    return str((Path(data.root) / name).resolve())


def rooted(recipe: RecipeT) -> RecipeT:
    """The recipe as a worker can read it, which has another working directory: with an absolute ``data.root``."""
    root = recipe.data.root if "://" in recipe.data.root else str(Path(recipe.data.root).resolve())
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": root})})


def source_sets(data: DataConfig) -> list[str]:
    """The names of the sets that pretraining reads."""
    return [data.source, *data.mix, *([data.translate_to] if data.translate_to else [])]


def told_classes(recipe: TrainingRecipe, place: str) -> tuple[str, ...]:
    """Names of the classes of a set that the recipe's networks are told, in the order of their labels; none where they are
    told none."""
    return open_cached(place).manifest.classes if recipe.training.generator.classes else ()


def domain_b(data: DataConfig, source: ShardSet) -> ShardSet | None:
    """The set of ``data.translate_to``, if any.

    Raises:
        UserError: when it cannot be opened, or its images have not the source's shape.
    """
    if data.translate_to is None:
        return None
    found = open_cached(set_place(data, data.translate_to))
    if found.manifest.image_shape != source.manifest.image_shape:
        raise UserError(f"the set {data.translate_to} (data.translate_to) has images of shape {found.manifest.image_shape} and "
                        f"the source {source.manifest.image_shape}; pack it with the source's --size and --channels.")
    return found


def source_parts(data: DataConfig, source: ShardSet) -> list[Part]:
    """What pretraining mixes: the source set, by class if the recipe weighs its classes, and the sets of ``data.mix``.

    The images that are held back (`held_back`) are not among them.

    Raises:
        UserError: for an unknown class, a weight that is not positive, or a set that cannot be opened.
    """
    parts = [Part(source)]
    if data.class_weights != "natural":
        parts = class_parts(source, None if data.class_weights == "balanced" else data.class_weights)
        whole = sum(part.weight for part in parts)  # together the classes weigh what the set would
        parts = [Part(part.shard_set, part.weight / whole, part.split, part.subset) for part in parts]
    if len(held := held_back(data, source)):
        parts = [Part(source, part.weight, part.split, _without(source, part, held)) for part in parts]
    return parts + [Part(open_cached(set_place(data, name)), weight) for name, weight in data.mix.items()]


def source_id(data: DataConfig, source: ShardSet) -> str:
    """Identifies the images that pretraining reads, wherever they lie."""
    further = source_sets(data)[1:]
    if not further:
        return source.manifest.sha256
    return content_id(source.manifest.sha256, *(open_cached(set_place(data, name)).manifest.sha256 for name in further))


def held_back(data: DataConfig, source: ShardSet) -> np.ndarray:
    """The training images, as sample ids, that pretraining leaves out so that the discriminator can be asked about them:
    none where the source has a reference split, else ``data.held_back`` of them, at most 1 in 20, whatever the seed."""
    if source.manifest.splits["reference"]:
        return np.empty(0, np.int64)
    ids = source.indices()
    count = min(data.held_back, len(ids) // 20)
    return np.sort(ids[torch.randperm(len(ids), generator=generator(0, "held back", 0))[:count].numpy()])


def watched_ids(data: DataConfig, source: ShardSet) -> tuple[np.ndarray, np.ndarray]:
    """Sample ids of the source that are trained on, and those of the same classes that are not."""
    parts = [part for part in source_parts(data, source) if part.shard_set is source]
    trained = np.unique(np.concatenate([source.indices() if part.subset is None else part.subset for part in parts]))
    held = held_back(data, source)
    other = held if len(held) else source.indices("reference")
    labels = source.samples["label"]
    return trained, other[np.isin(labels[other], np.unique(labels[trained]))]


def _without(source: ShardSet, part: Part, held: np.ndarray) -> np.ndarray:
    """A part's sample ids without those held back; a class of which nothing would be left keeps them."""
    ids = source.indices(part.split) if part.subset is None else np.asarray(part.subset)
    kept = np.setdiff1d(ids, held, assume_unique=True)
    return kept if len(kept) else ids
