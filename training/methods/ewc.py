"""Elastic weight consolidation of the generator (Li et al. 2020, "Few-shot image generation with elastic weight
consolidation", section 3, after Kirkpatrick et al. 2017): lambda sum_i F_i (theta_i - theta_s,i)^2 joins its loss, so that a
weight may move the less the more the source's images depend on it.

F_i = E_z[(dL / dtheta_s,i)^2], one sample at a time, where L = -log sigmoid(D_s(G_s(z))) is the source discriminator's
cross-entropy on the source's own samples. The size of F follows that of L, so F is divided by its mean over the network: a
lambda is then that of L2-SP, and not the published one, which holds for one network only.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import softplus

from data_shards.errors import UserError
from training.config import Config
from training.draws import latents
from training.families import Phase
from training.methods.l2sp import anchored
from training.methods.method import Adaptation, Method, discriminator_of, with_term
from training.objectives.packing import pack
from training.world import device


class EwcConfig(Config):
    weight: float = Field(0.05, ge=0, description="weight lambda of sum_i F_i (theta_i - theta_s,i)^2, where F has the mean 1")
    samples: int = Field(128, ge=1, description="generated images over which the Fisher information F is averaged")


def fisher_information(generator: nn.Module, discriminator: nn.Module, z: Tensor, *, packed: int = 1,
                       group: int = 1) -> dict[str, Tensor]:
    """F of each weight of G by name, of mean 1 over all of them, from latents z (N, latent_dim).

    A discriminator that judges several images at once, ``packed`` ones or ``group`` ones for their deviation, has a loss for
    each such lot only: lots, of which N is a multiple, stand for samples then. Both networks are used in evaluation mode and
    left as they are; a conditional one is told all classes in turn.

    Raises:
        UserError: when D's logits do not depend on G's weights, or not in finite numbers.
    """
    generator = copy.deepcopy(generator).requires_grad_(True).eval()
    discriminator = copy.deepcopy(discriminator).requires_grad_(False).eval()
    weights = dict(generator.named_parameters())
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    classes = getattr(generator, "classes", 0)
    for first in range(0, len(z), packed * group):
        rows = torch.arange(first, first + packed * group, device=z.device)
        labels = rows % classes if classes else None
        logits = discriminator(pack(generator(z[rows], labels), packed), labels)
        gradients = torch.autograd.grad(softplus(-logits).mean(), list(weights.values()), allow_unused=True)
        for sum_of_squares, gradient in zip(total.values(), gradients, strict=True):
            if gradient is not None:
                sum_of_squares += gradient.square()
    mean = torch.stack([values.sum() for values in total.values()]).sum() / sum(values.numel() for values in total.values())
    if not bool(mean > 0) or not bool(mean.isfinite()):
        raise UserError("the method ewc finds no importance of weights, since the source's discriminator does not react to "
                        "what its generator makes; pretrain longer, or use l2sp.")
    return {name: values / mean for name, values in total.items()}


def phases(adaptation: Adaptation) -> Sequence[Phase]:
    """The family's, the generator's with the penalty.

    Raises:
        UserError: for a family without a discriminator to tell which weights matter.
    """
    discriminator = discriminator_of(adaptation.source, adaptation, "the method ewc reads which weights matter off")
    training, config = adaptation.recipe.training, adaptation.recipe.adaptation.ewc
    if adaptation.rehearsed:  # the discriminator of a source knows something, a fresh one need not
        return adaptation.phases
    packed, group = training.objective.pack, training.discriminator.minibatch_std or 1
    count = -(-config.samples // (packed * group)) * packed * group
    z = latents(adaptation.seed, "fisher", 0, count, training.generator.latent_dim).to(device())
    importance = fisher_information(adaptation.source["generator"], discriminator, z, packed=packed, group=group)
    return with_term(adaptation.phases, "generator", "ewc", config.weight, anchored(adaptation, "generator", importance))


METHOD = Method(start="pretrain", phases=phases, hyperparameters=("lr", "r1", "ewc.weight"))
