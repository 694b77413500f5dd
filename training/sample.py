"""What a checkpoint's generator makes: a grid of pictures, or a set of shards that is a source like any other."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_shards import ShardSet, pack_arrays
from data_shards.errors import UserError
from training.checkpoint import checkpoint_hash, load_checkpoint
from training.draws import latents
from training.families import FAMILIES
from training.networks import load_weights, make_networks
from training.pictures import generate, save_grid
from training.recipe import TrainingRecipe, resolve

CHUNK = 256  # images that are generated at once; image i comes of draw i // CHUNK, whatever is asked for


def sample_grid(checkpoint: Path, out: Path, count: int = 64, seed: int = 0, truncation: float | None = None) -> Path:
    """Write a PNG grid of ``count`` samples of the checkpoint's averaged generator; the same seed draws the same latents.

    Returns:
        ``out``, or where samples are lines of text the text file of the same name that is written beside it.

    Raises:
        UserError: when the checkpoint is damaged or is no generator's.
    """
    network, recipe, _ = averaged_generator(checkpoint)
    family = FAMILIES[recipe.training.family]
    samples = generate(network, truncated(latents(seed, "samples", 0, count, recipe.training.generator.latent_dim), truncation))
    save_grid(family.pictures(recipe.training, samples), out, columns=max(1, round(count**0.5)))
    if not (family.written and (lines := family.written(recipe.training, samples))):
        return out
    text = out.with_suffix(".txt")
    text.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return text


def sample_shards(checkpoint: Path, out: str, count: int, seed: int = 0, truncation: float | None = None, *,
                  overwrite: bool = False, progress: Callable[[int, int, int], None] | None = None,
                  say: Callable[[str], None] | None = None) -> ShardSet:
    """Pack ``count`` images of the checkpoint's averaged generator as the set ``out``, with where they come from.

    The set's provenance names the checkpoint and its hash, the seed and the truncation. A killed call goes on.

    Raises:
        UserError: when the checkpoint is damaged or is no generator's, or ``out`` is there already.
    """
    network, recipe, state = averaged_generator(checkpoint)
    provenance = {"checkpoint": "/".join(checkpoint.resolve().parts[-3:]), "checkpoint_sha256": checkpoint_hash(checkpoint),
                  "images_seen": state["images"], "network": "generator_ema", "seed": seed, "truncation": truncation}
    known: dict[int, np.ndarray] = {}

    def make(number: int) -> tuple[np.ndarray, int]:
        chunk = number // CHUNK
        if chunk not in known:
            known.clear()
            z = latents(seed, "synthetic", chunk, CHUNK, recipe.training.generator.latent_dim)
            known[chunk] = generate(network, truncated(z, truncation)).numpy()
        return known[chunk][number % CHUNK], -1

    identity = f"{provenance['checkpoint_sha256']} {seed} {truncation}"
    return pack_arrays(make, count, out, name=f"{recipe.name}-synthetic", shape=tuple(state["image_shape"]), identity=identity,
                       provenance=provenance, licence="generated", overwrite=overwrite, progress=progress, say=say)


def truncated(z: Tensor, threshold: float | None) -> Tensor:
    """Standard normal latents (N, d) moved, each in its rank, to the normal distribution cut off at +-``threshold``.

    The truncation trick of BigGAN (Brock et al. 2019, section 3.1) by the inverse of the distribution function instead of
    by drawing again, so that a picture changes smoothly with the threshold.

    Raises:
        UserError: when ``threshold`` is not over 0.
    """
    if threshold is None:
        return z
    if not threshold > 0:
        raise UserError(f"truncation {threshold} must be over 0; 2 cuts little off, 0.5 much.")
    cut = 0.5 * (1 + math.erf(-threshold / math.sqrt(2)))
    return torch.special.ndtri(cut + torch.special.ndtr(z.double()) * (1 - 2 * cut)).clamp(-threshold, threshold).to(z)


def averaged_generator(checkpoint: Path) -> tuple[nn.Module, TrainingRecipe, dict[str, Any]]:
    """The averaged generator of a checkpoint on this process's device, with the recipe and the state that lie beside it."""
    tensors, state = load_checkpoint(checkpoint, ("generator_ema",))
    recipe = resolve(TrainingRecipe, state["recipe"], where=str(checkpoint))
    network = make_networks(recipe.training, tuple(state["image_shape"]), 0)["generator"]
    load_weights(network, tensors["generator_ema"], what=f"{checkpoint}/generator_ema.safetensors")
    return network, recipe, state
