"""Building the networks of a recipe, and moving weights into them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from data_shards.errors import UserError
from training.checkpoint import load_checkpoint
from training.draws import generator as draw
from training.families import FAMILIES
from training.models.layers import Shape
from training.recipe import TrainingConfig
from training.transplant import Transplant, transplant
from training.world import device


def make_networks(config: TrainingConfig, shape: Shape, seed: int) -> dict[str, nn.Module]:
    """Fresh networks on this process's device; the same seed gives the same weights on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(seed, "weights", 0).initial_seed())
        networks = FAMILIES[config.family].networks(config, shape)
    return {name: network.to(device()) for name, network in networks.items()}


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], *, what: str) -> None:
    """Strict: every tensor must be there and fit.

    Raises:
        UserError: naming the first tensor that is missing, unexpected or of another shape.
    """
    own = network.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        if name not in weights or name not in own:
            side = "is not in the checkpoint" if name in own else "is in the checkpoint only"
            raise UserError(f"{what} does not fit this recipe's network: {name} {side}; use the recipe it was trained with.")
        if own[name].shape != weights[name].shape:
            raise UserError(f"{what} does not fit this recipe's network: {name} is {tuple(weights[name].shape)} there and "
                            f"{tuple(own[name].shape)} here; use the recipe it was trained with.")
    network.load_state_dict(dict(weights))


def load_start(networks: Mapping[str, nn.Module], checkpoint: Path, classes: Sequence[str] = ()) -> dict[str, Transplant]:
    """Begin from a checkpoint: the averaged generator, which is the better one, and the other networks.

    Args:
        classes: names of the classes that the networks are told; the checkpoint's may be others, or none.

    Returns:
        What became of each network's tensors.

    Raises:
        UserError: for any difference but in classes.
    """
    stems = {name: best_stem(name) for name in networks}
    tensors, state = load_checkpoint(checkpoint, tuple(stems.values()))
    return {name: transplant(network, tensors[stems[name]], what=f"{checkpoint}/{stems[name]}.safetensors", classes=classes,
                             source_classes=state.get("classes", ())) for name, network in networks.items()}


def best_stem(network: str) -> str:
    """The file of a checkpoint to begin from: the generator's moving average is better than the generator."""
    return "generator_ema" if network == "generator" else network
