"""Pictures from a checkpoint."""

from __future__ import annotations

from pathlib import Path

from training.checkpoint import load_checkpoint
from training.draws import latents
from training.networks import load_weights, make_networks
from training.pictures import generate, save_grid
from training.recipe import TrainingRecipe, resolve


def sample_grid(checkpoint: Path, out: Path, count: int = 64, seed: int = 0) -> Path:
    """Write a PNG grid of ``count`` images of the checkpoint's averaged generator; the same seed draws the same latents.

    Raises:
        UserError: when the checkpoint is damaged or is no generator's.
    """
    tensors, state = load_checkpoint(checkpoint, ("generator_ema",))
    recipe = resolve(TrainingRecipe, state["recipe"], where=str(checkpoint))
    network = make_networks(recipe.training, tuple(state["image_shape"]), 0)["generator"]
    load_weights(network, tensors["generator_ema"], what=f"{checkpoint}/generator_ema.safetensors")
    z = latents(seed, "samples", 0, count, recipe.training.generator.latent_dim)
    save_grid(generate(network, z), out, columns=max(1, round(count**0.5)))
    return out
