"""Generative adversarial networks: a discriminator's and a generator's step."""

from __future__ import annotations

import torch
from torch import Tensor

from training.families.phase import Batch, Networks, Phase, Terms
from training.objectives import OBJECTIVES
from training.objectives.penalties import finite_difference_norms, squared_gradient_norms


def gan_phases(objective: str, *, exact: bool = True) -> list[Phase]:
    """Discriminator, then generator, with R1 and R2 penalties weighted by ``weights["r1"]`` and ``["r2"]``.

    Args:
        exact: penalties by double backward; else by finite differences, which need single backward passes only (ZeRO 3).
    """
    adversarial = OBJECTIVES[objective]

    def discriminator(networks: Networks, batch: Batch) -> Terms:
        network = networks["discriminator"]
        with torch.no_grad():
            fake = networks["generator"](batch.latents["discriminator"]).float()
        both = torch.cat([batch.images, fake])
        penalised = bool(batch.weights["r1"] or batch.weights["r2"])
        if penalised and not exact:
            logits, norms = finite_difference_norms(network, both)
        else:
            logits = network(both.requires_grad_(penalised))
            norms = squared_gradient_norms(logits, both) if penalised else torch.zeros(())
        real_logits, fake_logits = logits.float().chunk(2)
        loss = adversarial.discriminator(real_logits, fake_logits)
        terms = {"total": loss, "adversarial": loss.detach(),
                 "real_logit": real_logits.detach().mean(), "fake_logit": fake_logits.detach().mean()}
        if penalised:
            r1, r2 = (half.mean() for half in norms.chunk(2))
            terms["total"] = loss + batch.weights["r1"] / 2 * r1 + batch.weights["r2"] / 2 * r2
            terms |= {"r1": r1.detach(), "r2": r2.detach()}
        return terms

    def generator(networks: Networks, batch: Batch) -> Terms:
        fake = networks["generator"](batch.latents["generator"])
        with torch.no_grad():
            real_logits: Tensor = networks["discriminator"](batch.images).float()
        loss = adversarial.generator(real_logits, networks["discriminator"](fake).float())
        return {"total": loss, "adversarial": loss.detach()}

    return [Phase("discriminator", discriminator), Phase("generator", generator)]
