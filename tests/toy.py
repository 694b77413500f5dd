"""A small set of drawings made here, packed as any other set: bars (class 0) and crosses (class 1) of 16 px."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_shards import Sample, ShardSet, pack_images
from training.recipe import TrainingRecipe

SIZE = 16


def toy_set(folder: Path, *, train: int = 96, reference: int = 16, seed: int = 0, shard_samples: int = 16) -> ShardSet:
    """Pack ``train`` + ``reference`` drawings into ``folder``."""
    rng = np.random.default_rng(seed)

    def samples() -> list[Sample]:
        found = []
        for i in range(train + reference):
            image = np.zeros((1, SIZE, SIZE), np.uint8)
            row, column = rng.integers(2, SIZE - 4, 2)
            image[0, row:row + 2, 1:-1] = rng.integers(128, 256)
            if i % 2:
                image[0, 1:-1, column:column + 2] = 255
            found.append(Sample(f"drawing-{i:03d}", image, i % 2, "train" if i < train else "reference"))
        return found

    return pack_images(samples(), folder, name=folder.name, shape=(1, SIZE, SIZE), classes=["bar", "cross"],
                       shard_samples=shard_samples)


def stroke_set(folder: Path, *, train: int = 45, reference: int = 24, seed: int = 5) -> ShardSet:
    """Closed strokes of 16 px, no two alike: a domain whose copies can be told from its other images."""
    rng, angle, found = np.random.default_rng(seed), np.linspace(0, 2 * np.pi, 120), []
    for i in range(train + reference):
        radius = 4.5 + sum(rng.normal(0, 1.2) * np.cos(k * angle + rng.uniform(0, 6.3)) for k in range(1, 5))
        rows, columns = (np.clip(np.round(8 + radius * wave), 0, SIZE - 1).astype(int)
                         for wave in (np.sin(angle), np.cos(angle)))
        image = np.zeros((1, SIZE, SIZE), np.uint8)
        image[0, rows, columns] = 255
        found.append(Sample(f"stroke-{i:03d}", image, 0, "train" if i < train else "reference"))
    return pack_images(found, folder, name=folder.name, shape=(1, SIZE, SIZE), classes=["stroke"], shard_samples=64)


def toy_tree(root: Path, **training: object) -> dict[str, object]:
    """A recipe's tree over the set ``root/source``: small networks, the plain engine."""
    return {
        "name": "toy", "data": {"source": "source", "root": str(root)},
        "training": {"images": 64, "batch": 8, "generator": {"channels": 4, "latent_dim": 4},
                     "discriminator": {"channels": 4}, "engine": {"kind": "torch"}, "ema_halflife_images": 50,
                     "report_every_images": 16, "snapshot_every_images": 32, "precision": "fp32", **training},
        "meta": {"steps": 3, "tasks": 2, "inner_steps": 2, "inner_batch": 4, "shots": 4, "report_every_steps": 1,
                 "snapshot_every_steps": 2},
        "adaptation": {"shots": 5, "batch": 4, "images": 32, "frozen_blocks": 1},
        "evaluation": {"samples": 32, "encoder_images": 512}, "wandb": {"mode": "disabled"}}


def toy_recipe(root: Path, **training: object) -> TrainingRecipe:
    return TrainingRecipe.model_validate(toy_tree(root, **training))
