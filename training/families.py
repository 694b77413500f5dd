"""Families of generative models: each returns its phases in the order in which a step runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.objectives import OBJECTIVES
from training.objectives.penalties import squared_gradient_norms

Networks = Mapping[str, nn.Module]
Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step: what a phase may use."""

    images: Tensor  # float32 NCHW in [-1, 1]
    latents: Mapping[str, Tensor]  # one independent draw per phase, (N, latent_dim)
    weights: Mapping[str, float]  # scheduled weights at this point of training


@dataclass(frozen=True)
class Phase:
    """One network's step: ``loss`` returns named scalars, the first of which, "total", is what goes backward."""

    network: str
    loss: Callable[[Networks, Batch], Terms]


def gan_phases(objective: str) -> list[Phase]:
    """Discriminator, then generator, with exact R1 and R2 penalties weighted by ``weights["r1"]`` and ``["r2"]``."""
    adversarial = OBJECTIVES[objective]

    def discriminator(networks: Networks, batch: Batch) -> Terms:
        with torch.no_grad():
            fake = networks["generator"](batch.latents["discriminator"]).float()
        both = torch.cat([batch.images, fake])
        penalised = bool(batch.weights["r1"] or batch.weights["r2"])
        both.requires_grad_(penalised)
        logits = networks["discriminator"](both)
        real_logits, fake_logits = logits.float().chunk(2)
        loss = adversarial.discriminator(real_logits, fake_logits)
        terms = {"total": loss, "adversarial": loss.detach(),
                 "real_logit": real_logits.detach().mean(), "fake_logit": fake_logits.detach().mean()}
        if penalised:
            r1, r2 = (norms.mean() for norms in squared_gradient_norms(logits, both).chunk(2))
            terms["total"] = loss + batch.weights["r1"] / 2 * r1 + batch.weights["r2"] / 2 * r2
            terms |= {"r1": r1.detach(), "r2": r2.detach()}
        return terms

    def generator(networks: Networks, batch: Batch) -> Terms:
        fake = networks["generator"](batch.latents["generator"])
        with torch.no_grad():
            real_logits = networks["discriminator"](batch.images).float()
        loss = adversarial.generator(real_logits, networks["discriminator"](fake).float())
        return {"total": loss, "adversarial": loss.detach()}

    return [Phase("discriminator", discriminator), Phase("generator", generator)]


FAMILIES = {"gan": gan_phases}
