"""RSSA (Xiao et al. 2022, "Few shot generative model adaption via relaxed spatial structural alignment", section 3.2): images
of the adapted generator keep the spatial structure of the source's images of the same latents; and D judges patches away from
anchors, as in CDC (`anchors.py`). A family without a discriminator gets the first part only.

With f the outputs of a block, each place's vector of unit length: self-correlation is f^T f within an image, disturbance
correlation the softmax of f_i^T f_j, over j's places, for two latents near each other. Both are compared between target and
source by L1 and summed over the blocks, as in the authors' code, to which the weights belong.

Differences: no compression of the latent space towards inverted target images, the "relaxed" part, which needs latents of the
support images; blocks finer than 16 x 16 places are averaged to that, where the code cuts finer ones into windows; the
latents of a group are disturbed from its first, where the code of that term draws them freely.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, normalize

from data_shards.errors import UserError
from training.config import Config
from training.families import Batch, Networks, Phase
from training.methods.anchors import add_patch_head, anchored_phases, check_groups
from training.methods.features import block_outputs, check_blocks, grouped, target_and_source
from training.methods.method import Adaptation, Method, with_term

PLACES = 16
"""Most places along a side: correlations grow with its fourth power."""


class RssaConfig(Config):
    self_weight: float = Field(0.8, ge=0, description="weight of the self-correlation's distance, a mean over pairs of places")
    disturbance_weight: float = Field(0.4, ge=0, description="weight of the disturbance correlation's distance, a mean over "
                                                             "places, each a sum over the other image's")
    disturbance: float = Field(0.15, gt=0, le=1, description="share a of an own latent in a (own) + (1 - a) (the group's)")
    group: int = Field(4, ge=2, description="images that are compared with each other; adaptation.batch is a multiple of it")


def places(features: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, places, C), unit vectors, at most `PLACES` a side."""
    height, width = (min(side, PLACES) for side in features.shape[2:])
    return normalize(adaptive_avg_pool2d(features, (height, width)).flatten(2).mT, dim=-1)


def self_correlation(target: Sequence[Tensor], source: Sequence[Tensor]) -> Tensor:
    """Sum over the blocks of the mean |f_t^T f_t - f_s^T f_s|."""
    found = []
    for ours, theirs in zip(target, source, strict=True):
        t, s = places(ours), places(theirs)
        found.append((t @ t.mT - s @ s.mT).abs().mean())
    return torch.stack(found).sum()


def disturbance_correlation(target: Sequence[Tensor], source: Sequence[Tensor], group: int) -> Tensor:
    """Sum over the blocks of the mean over pairs i < j of a group, and over the places of i, of |p_t - p_s| summed over the
    places of j, p = softmax(f_i^T f_j)."""
    first, second = torch.triu_indices(group, group, 1)
    found = []
    for ours, theirs in zip(target, source, strict=True):
        t, s = grouped(places(ours), group), grouped(places(theirs), group)
        p_t, p_s = ((f[:, first] @ f[:, second].mT).softmax(-1) for f in (t, s))
        found.append((p_t - p_s).abs().sum(-1).mean())
    return torch.stack(found).sum()


def disturbed(z: Tensor, share: float, group: int) -> Tensor:
    """Latents (N, D) moved towards the first of their group: share z + (1 - share) z_first."""
    first = z[:len(z) // group].repeat(group, 1)
    return share * z + (1 - share) * first


def prepare(networks: Networks, adaptation: Adaptation) -> None:
    """Add the patch head.

    Raises:
        UserError: as `add_patch_head`, for a batch that does not fall into groups, and a generator without blocks or places.
    """
    check_blocks(networks["generator"], adaptation, "rssa")
    check_groups("adaptation.rssa.group", adaptation.recipe.adaptation.rssa.group, adaptation, "rssa")
    generator = networks["generator"]
    _check_places(generator, adaptation)
    add_patch_head(networks, adaptation, "rssa")


def phases(adaptation: Adaptation) -> Sequence[Phase]:
    config = adaptation.recipe.adaptation.rssa

    def alike(networks: Networks, batch: Batch) -> Tensor:
        return self_correlation(*target_and_source(networks, adaptation.source, batch))

    def alike_disturbed(networks: Networks, batch: Batch) -> Tensor:
        z = disturbed(batch.latents["generator"], config.disturbance, config.group)
        return disturbance_correlation(*target_and_source(networks, adaptation.source, batch, z), config.group)

    found = with_term(anchored_phases(adaptation), "generator", "self_correlation", config.self_weight, alike)
    return with_term(found, "generator", "disturbance_correlation", config.disturbance_weight, alike_disturbed)


@torch.no_grad()
def _check_places(generator: nn.Module, adaptation: Adaptation) -> None:
    training = adaptation.recipe.training
    place = next(generator.parameters()).device
    z = torch.zeros(1, training.generator.latent_dim, device=place)
    if any(found.dim() != 4 for found in block_outputs(generator, z, torch.zeros(1, dtype=torch.long, device=place))):
        raise UserError(f"the method rssa compares places of feature maps, which a generator of the model "
                        f"{training.generator.model} has none of; use a convolutional model, or leave the method out of "
                        "fanout.methods.")


METHOD = Method(start="pretrain", prepare=prepare, phases=phases,
                hyperparameters=("lr", "r1", "rssa.self_weight", "rssa.disturbance_weight", "anchors.deviation",
                                 "anchors.patch_blocks"))
