"""CDC (Ojha et al. 2021, "Few-shot image generation via cross-domain correspondence"): images of the adapted generator keep the
distances to each other that the source's images of the same latents have; and D judges patches away from anchors
(`anchors.py`). A family without a discriminator gets the first part only.

Equations 2 and 3: for each latent i of a group and each block l, y_i^l = softmax over j != i of the cosine similarity of the
block's outputs for i and j; the term is KL(y_i of the target || y_i of the source), summed over j, averaged over i
("batchmean") and over l. The authors' code takes one random layer a step, of which our mean over the layers is the expectation,
the other direction of the divergence, and PyTorch's reduction "mean", which divides by the group's 3 others too: its weight
1000 is 333 here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, normalize

from training.config import Config
from training.families import Batch, Networks, Phase
from training.methods.anchors import add_patch_head, anchored_phases, check_groups
from training.methods.features import check_blocks, grouped, target_and_source
from training.methods.method import Adaptation, Method, with_term


class CdcConfig(Config):
    weight: float = Field(333.0, ge=0, description="weight of the distance consistency, a divergence in nats")
    group: int = Field(4, ge=3, description="images that are compared with each other; adaptation.batch is a multiple of it")


def log_similarities(features: Tensor, group: int) -> Tensor:
    """log y: (N, ...) -> (N, group - 1), the log-softmax over an image's cosine similarities to the others of its group."""
    directions = normalize(grouped(features.flatten(1), group), dim=-1)
    cosines = directions @ directions.mT
    others = ~torch.eye(group, dtype=torch.bool, device=features.device)
    return log_softmax(cosines[:, others].unflatten(1, (group, group - 1)), -1).flatten(0, 1)


def distance_consistency(target: Sequence[Tensor], source: Sequence[Tensor], group: int) -> Tensor:
    """Mean over the layers' outputs (N, ...) of KL(y of the target || y of the source), a scalar."""
    return torch.stack([kl_div(log_similarities(theirs, group), log_similarities(ours, group), reduction="batchmean",
                               log_target=True) for ours, theirs in zip(target, source, strict=True)]).mean()


def prepare(networks: Networks, adaptation: Adaptation) -> None:
    """Add the patch head.

    Raises:
        UserError: as `add_patch_head`, for a batch that does not fall into groups, and for a generator without blocks.
    """
    check_blocks(networks["generator"], adaptation, "cdc")
    check_groups("adaptation.cdc.group", adaptation.recipe.adaptation.cdc.group, adaptation, "cdc")
    add_patch_head(networks, adaptation, "cdc")


def phases(adaptation: Adaptation) -> Sequence[Phase]:
    config = adaptation.recipe.adaptation.cdc

    def term(networks: Networks, batch: Batch) -> Tensor:
        return distance_consistency(*target_and_source(networks, adaptation.source, batch), config.group)

    return with_term(anchored_phases(adaptation), "generator", "distance_consistency", config.weight, term)


METHOD = Method(start="pretrain", prepare=prepare, phases=phases,
                hyperparameters=("lr", "r1", "cdc.weight", "anchors.deviation", "anchors.patch_blocks"))
