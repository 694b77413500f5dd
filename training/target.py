"""A target domain's images under one seed, and their features, kept over the trials of a process."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_shards import ShardSet, load_images
from data_shards.errors import UserError
from training.corruption import Corruption, corrupt_pool
from training.draws import generator
from training.metrics.extraction import image_features
from training.metrics.features import FeatureNet, load_feature_net
from training.recipe import RecipeT
from training.source import open_cached
from training.world import device

HELD_BACK = 8  # images of the pool, at least, that no method trains on


@functools.lru_cache(maxsize=2)
def feature_net(name: str, run: str) -> FeatureNet:
    """The contract's net; the in-domain encoder lies in the run's folder."""
    return load_feature_net(name, Path(run) / "encoder.safetensors" if name == "encoder" else None, device())


@dataclass(frozen=True)
class Target:
    """A domain's images under one seed: all uint8 NCHW, disjoint."""

    support_indices: tuple[int, ...]
    support: Tensor
    held_back: Tensor  # the rest of the support pool: candidates are chosen on it
    reference: Tensor  # the final score's, used for nothing else
    image_shape: tuple[int, int, int]
    reference_sha256: str


def support_indices(images: ShardSet, shots: int, seed: int) -> tuple[int, ...]:
    """The ``shots`` images of the pool that a seed trains on.

    Raises:
        UserError: when the pool has fewer than ``shots`` images and some to hold back.
    """
    pool = images.indices("train")
    if len(pool) < shots + HELD_BACK:
        raise UserError(f"the target set {images.path} has {len(pool)} images in its support pool and needs at least "
                        f"{shots + HELD_BACK}: adaptation.shots = {shots} to train on and {HELD_BACK} held back to choose "
                        "candidates on; lower adaptation.shots or pack more images.")
    order = torch.randperm(len(pool), generator=generator(seed, "support", 0))
    return tuple(int(pool[i]) for i in order[:shots])


def support_keys(images: ShardSet, shots: int, seeds: Sequence[int]) -> dict[str, list[str]]:
    """Seed -> the keys of the images that it trains on, so that others can train on the same."""
    keys = images.samples["key"]
    return {str(seed): [key.decode() for key in keys[list(support_indices(images, shots, seed))].tolist()] for seed in seeds}


def for_target(recipe: RecipeT, images: ShardSet) -> RecipeT:
    """The recipe of a trial on ``images``: its networks are told their classes where ``adaptation.conditional`` says so, else
    none, whatever the source's were told.

    Raises:
        UserError: when they are to be told classes that the set does not have.
    """
    classes = len(images.manifest.classes) if recipe.adaptation.conditional else 0
    if recipe.adaptation.conditional and (not classes or (images.samples["label"][images.indices("train")] < 0).any()):
        raise UserError(f"adaptation.conditional tells the networks each image's class, and the target set {images.path} has "
                        "images without one; pack it with one subfolder per class, or leave adaptation.conditional out.")
    generator = recipe.training.generator.model_copy(update={"classes": classes})
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"generator": generator})})


@functools.lru_cache(maxsize=16)
def load_target(path: str, shots: int, seed: int, corruption: Corruption | None = None, source: str = "") -> Target:
    """A domain's images under one seed.

    Args:
        corruption: of the support pool, of both its parts alike: who has it does not know which of its images are good. The
            reference stays clean.
        source: the place of the source set, of which mislabelled images are.

    Raises:
        UserError: for a pool or a reference that is too small.
    """
    images = open_cached(path)
    chosen = support_indices(images, shots, seed)
    reference = images.indices("reference")
    if len(reference) < 8:
        raise UserError(f"the target set {path} has {len(reference)} reference images; pack it with --reference 0.5.")
    rest = [int(i) for i in images.indices("train") if int(i) not in set(chosen)]
    pool = {"support": load_images(images, list(chosen))[0], "held back": load_images(images, rest)[0]}
    if corruption and corruption.share:
        strangers = _strangers(source, len(pool["held back"]), seed) if corruption.kind == "mislabelled" else torch.empty(0)
        pool = {name: corrupt_pool(part, corruption, seed, name, strangers) for name, part in pool.items()}
    return Target(chosen, pool["support"], pool["held back"], load_images(images, reference)[0], images.manifest.image_shape,
                  images.manifest.sha256)


def _strangers(source: str, count: int, seed: int) -> Tensor:
    """Images of the source that a pool's corrupted ones become."""
    images = open_cached(source)
    ids = images.indices()
    chosen = torch.randperm(len(ids), generator=generator(seed, "strangers", 0))[:count]
    return load_images(images, [int(ids[i]) for i in chosen])[0]


@functools.lru_cache(maxsize=16)
def target_features(path: str, shots: int, seed: int, net: str, run: str, corruption: Corruption | None = None,
                    source: str = "") -> dict[str, Tensor]:
    """Features of a target's three parts under the contract's net."""
    target, extractor = load_target(path, shots, seed, corruption, source), feature_net(net, run)
    parts = {"support": target.support, "held_back": target.held_back, "reference": target.reference}
    return {name: image_features(images, extractor) for name, images in parts.items()}
