"""What a checkpoint's generator makes: a grid of pictures, or a set of shards that is a source like any other."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_shards import ShardSet, load_images, pack_arrays
from data_shards.errors import UserError
from training.checkpoint import checkpoint_hash, load_checkpoint
from training.draws import latents
from training.families import FAMILIES, check_generates
from training.models.translation import Translators
from training.networks import load_weights, make_networks
from training.pictures import above_and_below, generate, save_grid, translate
from training.recipe import TrainingRecipe, resolve

CHUNK = 256  # images that are generated at once; image i comes of draw i // CHUNK, whatever is asked for


def sample_grid(checkpoint: Path, out: Path, count: int = 64, seed: int = 0, truncation: float | None = None) -> Path:
    """Write a PNG grid of ``count`` samples of the checkpoint's averaged generator; the same seed draws the same latents.

    Args:
        truncation: of the styles where the generator has styles, else of the latents (`truncating`).

    Returns:
        ``out``, or where samples are lines of text the text file of the same name that is written beside it.

    Raises:
        UserError: when the checkpoint is damaged or is no generator's.
    """
    network, recipe, _ = averaged_generator(checkpoint)
    family, (_, make) = FAMILIES[recipe.training.family], truncating(network, truncation)
    samples = make(latents(seed, "samples", 0, count, recipe.training.generator.latent_dim))
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

    The set's provenance names the checkpoint and its hash, the seed and the truncation, as "psi" where it is of styles
    (`truncating`). A killed call goes on.

    Raises:
        UserError: when the checkpoint is damaged or is no generator's, or ``out`` is there already.
    """
    network, recipe, state = averaged_generator(checkpoint)
    kind, draw = truncating(network, truncation)
    provenance = {**_origin(checkpoint, state), "seed": seed, kind: truncation}
    known: dict[int, np.ndarray] = {}

    def make(number: int) -> tuple[np.ndarray, int]:
        chunk = number // CHUNK
        if chunk not in known:
            known.clear()
            known[chunk] = draw(latents(seed, "synthetic", chunk, CHUNK, recipe.training.generator.latent_dim)).numpy()
        return known[chunk][number % CHUNK], -1

    identity = f"{provenance['checkpoint_sha256']} {seed} {truncation}"
    return pack_arrays(make, count, out, name=f"{recipe.name}-synthetic", shape=tuple(state["image_shape"]), identity=identity,
                       provenance=provenance, licence="generated", overwrite=overwrite, progress=progress, say=say)


def translate_grid(checkpoint: Path, images: ShardSet, out: Path, count: int = 64, *, reverse: bool = False) -> Path:
    """Write a PNG grid of the first ``count`` training images of a set, each row with its translations below it.

    Raises:
        UserError: when the checkpoint is damaged or no translator's, or does not fit the set.
    """
    translator, _, _ = averaged_translator(checkpoint, images, reverse=reverse)
    given, _ = load_images(images, _first(images, count))
    columns = max(1, round((2 * count)**0.5))
    save_grid(above_and_below(given, translate(translator, given), columns), out, columns)
    return out


def translate_shards(checkpoint: Path, images: ShardSet, out: str, count: int | None = None, *, reverse: bool = False,
                     overwrite: bool = False, progress: Callable[[int, int, int], None] | None = None,
                     say: Callable[[str], None] | None = None) -> ShardSet:
    """Pack the translations of the first ``count`` training images of a set (None: of all), with their classes, as the set
    ``out``, whose provenance names checkpoint and set. A killed call goes on.

    Raises:
        UserError: as `translate_grid`, or when ``out`` is there already.
    """
    translator, recipe, state = averaged_translator(checkpoint, images, reverse=reverse)
    ids = _first(images, count)
    known: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def make(number: int) -> tuple[np.ndarray, int]:
        chunk = number // CHUNK
        if chunk not in known:
            known.clear()
            given, labels = load_images(images, ids[chunk * CHUNK:(chunk + 1) * CHUNK])
            known[chunk] = translate(translator, given).numpy(), labels.numpy()
        made, classes = known[chunk]
        return made[number % CHUNK], int(classes[number % CHUNK])

    provenance = {**_origin(checkpoint, state), "direction": "b to a" if reverse else "a to b", "from": images.manifest.name,
                  "from_sha256": images.manifest.sha256}
    identity = f"{provenance['checkpoint_sha256']} {provenance['direction']} {images.manifest.sha256}"
    return pack_arrays(make, len(ids), out, name=f"{recipe.name}-translated", shape=images.manifest.image_shape,
                       identity=identity, classes=images.manifest.classes, provenance=provenance,
                       licence=images.manifest.licence, overwrite=overwrite, progress=progress, say=say)


def truncating(network: nn.Module, truncation: float | None) -> tuple[str, Callable[[Tensor], Tensor]]:
    """How ``network`` truncates, "psi" or "truncation", and what makes its uint8 images of latents, so truncated.

    A network with styles moves each style w to mean + psi (w - mean) (Karras et al. 2019, appendix B); of others the latents
    are cut off at +- ``truncation`` (`truncated`). None truncates nothing.

    Raises:
        UserError: for psi under 0, or a threshold not over 0.
    """
    if not hasattr(network, "mean_style"):
        truncated(torch.zeros(1, 1), truncation)
        return "truncation", lambda z: generate(network, truncated(z, truncation))
    if truncation is None:
        return "psi", lambda z: generate(network, z)
    if not 0 <= truncation < math.inf:
        raise UserError(f"truncation {truncation} of a generator with styles must be at least 0; 1 leaves its styles as they "
                        "are, 0 takes their mean.")
    return "psi", lambda z: generate(network, z, truncation=truncation)


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
    """The averaged generator of a checkpoint on this process's device, with the recipe and the state that lie beside it.

    Raises:
        UserError: when the checkpoint is damaged, or its generator makes no images from latents.
    """
    network, recipe, state = _averaged(checkpoint)
    check_generates(recipe.training, f"{checkpoint} is")
    return network, recipe, state


def averaged_translator(checkpoint: Path, images: ShardSet, *, reverse: bool = False
                        ) -> tuple[nn.Module, TrainingRecipe, dict[str, Any]]:
    """Likewise the averaged translator from domain A to domain B, or the ``reverse`` one, for ``images``.

    Raises:
        UserError: when the checkpoint is damaged or holds no translators, or the images have another shape.
    """
    network, recipe, state = _averaged(checkpoint)
    if not isinstance(network, Translators):
        raise UserError(f"{checkpoint} is of the family {recipe.training.family}, which makes images from noise and translates "
                        "none; leave --from out.")
    if tuple(state["image_shape"]) != images.manifest.image_shape:
        raise UserError(f"{checkpoint} translates images of shape {tuple(state['image_shape'])}, and those of {images.place} "
                        f"are {images.manifest.image_shape}; pack them with its --size and --channels.")
    return network.b_to_a if reverse else network.a_to_b, recipe, state


def _averaged(checkpoint: Path) -> tuple[nn.Module, TrainingRecipe, dict[str, Any]]:
    tensors, state = load_checkpoint(checkpoint, ("generator_ema",))
    recipe = resolve(TrainingRecipe, state["recipe"], where=str(checkpoint))
    network = make_networks(recipe.training, tuple(state["image_shape"]), 0)["generator"]
    load_weights(network, tensors["generator_ema"], what=f"{checkpoint}/generator_ema.safetensors")
    return network, recipe, state


def _origin(checkpoint: Path, state: dict[str, Any]) -> dict[str, Any]:
    """What a made set's manifest says of the checkpoint."""
    return {"checkpoint": "/".join(checkpoint.resolve().parts[-3:]), "checkpoint_sha256": checkpoint_hash(checkpoint),
            "images_seen": state["images"], "network": "generator_ema"}


def _first(images: ShardSet, count: int | None) -> np.ndarray:
    """Sample ids of the first ``count`` training images.

    Raises:
        UserError: when there are fewer.
    """
    ids = images.indices("train")
    if count is not None and count > len(ids):
        raise UserError(f"{count} images of {images.place} are asked for, and it has {len(ids)} training images; lower "
                        "--count.")
    return ids[:count]
