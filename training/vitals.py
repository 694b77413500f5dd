"""What `training.health` judges by: how far generated images lie apart, and whether D knows its training images.

A look is a pure function of the networks: it draws from fixed seeds and leaves weights, buffers and random state untouched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_shards import ShardSet, load_images
from training.draws import generator as draw
from training.draws import latents
from training.health import SIGNIFICANT
from training.loop import autocast, to_signed
from training.objectives.packing import pack
from training.world import World, device, rows_of_all

FEATURE_SIZE = 8  # images are compared after average pooling to so many pixels a side


@dataclass(frozen=True)
class Looked:
    """What is looked at, the same at every look: uint8 NCHW. Without held-out images D's overfitting is not watched."""

    training: Tensor
    held_out: Tensor
    seed: int
    latent_dim: int
    packed: int = 1  # images that D judges together

    @property
    def count(self) -> int:
        """Generated images, as many as real ones: distances to the nearest neighbour depend on their number."""
        return len(self.training)


def what_to_look_at(source: ShardSet, train_ids: np.ndarray, held_ids: np.ndarray, *, images: int, seed: int,
                    latent_dim: int, packed: int = 1) -> Looked:
    """The same ``images`` images of each kind on every rank, drawn without regard to the recipe's seed."""
    def some(purpose: str, ids: np.ndarray) -> Tensor:
        order = torch.randperm(len(ids), generator=draw(0, purpose, 0))[:images]
        return load_images(source, np.sort(ids[order.numpy()]))[0]

    return Looked(some("health training", train_ids), some("health held out", held_ids), seed=seed, latent_dim=latent_dim,
                  packed=packed)


def look(looked: Looked, networks: Mapping[str, nn.Module], world: World, batch: int,
         precision: str = "fp32") -> dict[str, float]:
    """The readings of this moment, the same on every rank. A collective; it leaves networks and random state as they were.

    Args:
        networks: the generator, z (N, latent_dim) -> images (N, C, H, W), and the discriminator, images -> logits, if any.
        batch: images of one forward pass on this rank, as in training.
    """
    z = world.slice(latents(looked.seed, "health", 0, looked.count, looked.latent_dim)).to(device())
    real, held = (to_signed(world.slice(images)) for images in (looked.training, looked.held_out))
    readings = {}
    with undisturbed(networks), autocast(precision):
        def through(network: Callable[[Tensor], Tensor], inputs: Tensor, count: int) -> Tensor:
            return _forward(network, inputs, batch, -(-count // world.size))

        fakes = through(networks["generator"], z, looked.count)
        made, natural = (distances(rows_of_all(features(images), world, looked.count)) for images in (fakes, real))
        for name, generated, reference in zip(("distance_ratio", "nearest_ratio"), made, natural, strict=True):
            readings[f"health/{name}"] = generated / reference if reference > 0 else 1.0
        if "discriminator" in networks and len(looked.held_out) >= world.size:
            on_real, on_held, on_fake = (
                _moments(through(lambda part: networks["discriminator"](pack(part, looked.packed)), images, count), world)
                for images, count in ((real, looked.count), (held, len(looked.held_out)), (fakes, looked.count)))
            readings |= overfitting_readings(on_real, on_held, on_fake)
    return readings


def features(images: Tensor) -> Tensor:
    """Average-pooled pixels, (N, C, H, W) -> (N, C * 64), fewer where a side has under 8: of the features that were tried,
    those in which collapse under noise stands out most and real images least (docs/HEALTH.md)."""
    height, width = (min(FEATURE_SIZE, side) for side in images.shape[2:])
    return nn.functional.adaptive_avg_pool2d(images.float().clamp(-1, 1), (height, width)).flatten(1)


def distances(features_ND: Tensor) -> tuple[float, float]:
    """Mean Euclidean distance of all pairs, and mean distance to the nearest other."""
    whole = torch.cdist(features_ND.double(), features_ND.double(), compute_mode="donot_use_mm_for_euclid_dist")
    count = len(whole)
    pairs = float(whole.sum()) / (count * (count - 1))
    return pairs, float(whole.fill_diagonal_(math.inf).min(dim=1).values.mean())


@dataclass(frozen=True)
class Moments:
    """Of D's logits on one kind of images, over all ranks."""

    mean: float
    variance: float  # of the mean


def overfitting_readings(train: Moments, held_out: Moments, generated: Moments) -> dict[str, float]:
    """r_v = (E[D_train] - E[D_held out]) / (E[D_train] - E[D_generated]) (Karras et al. 2020, equation 1), free of a constant
    in the logits, and its numerator in standard errors. Where D does not tell training from generated images, r_v is 0."""
    gap, whole = train.mean - held_out.mean, train.mean - generated.mean
    told = whole > SIGNIFICANT * math.sqrt(train.variance + generated.variance)
    error = math.sqrt(train.variance + held_out.variance)
    return {"health/r_v": gap / whole if told else 0.0, "health/r_v_z": gap / error if error > 0 else 0.0}


def _moments(logits: Tensor, world: World) -> Moments:
    values = logits.double()
    total = torch.stack([values.new_tensor(values.numel()), values.sum(), values.square().sum()])
    if world.size > 1:
        dist.all_reduce(total)
    count, first, second = total.tolist()
    mean = first / count
    return Moments(mean, max(0.0, second / count - mean**2) / max(1.0, count - 1))


def _forward(network: Callable[[Tensor], Tensor], inputs: Tensor, batch: int, most: int) -> Tensor:
    """The network's outputs as float32 in whole batches: under ZeRO 3 a forward is a collective, so every rank does as many
    as one with ``most`` inputs; inputs are repeated to fill up."""
    filled = torch.arange(-(-most // batch) * batch, device=inputs.device) % len(inputs)
    outputs = torch.cat([network(inputs[part]).float() for part in filled.split(batch)])
    return outputs[:len(outputs) * len(inputs) // len(filled)]  # a D that packs gives fewer logits than images


@contextmanager
def undisturbed(networks: Mapping[str, nn.Module]) -> Iterator[None]:
    """While inside, the networks are in evaluation mode without gradients, and random draws come of a fixed seed; after it
    everything is as it was."""
    modes = [(module, module.training) for network in networks.values() for module in network.modules()]
    places = [device()] if device().type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=places):
        torch.manual_seed(0)
        for module, _ in modes:
            module.training = False
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
