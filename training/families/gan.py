"""Generative adversarial networks: a discriminator's and a generator's step."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import torch
from torch import Tensor, nn

from training.augment import NO_AUGMENTATION, AugmentConfig, augment
from training.families.phase import Batch, Networks, Phase, Terms
from training.objectives import OBJECTIVES, PENALTIES
from training.objectives.packing import pack
from training.objectives.penalties import between, finite_difference_norms, squared_gradient_norms


def gan_phases(objective: str, *, exact: bool = True, packed: int = 1,
               augmentation: AugmentConfig = NO_AUGMENTATION) -> list[Phase]:
    """Discriminator, then generator. The batch's ``weights`` hold the penalties', named as in `PENALTIES`, and "augment",
    the augmentation's probability; what has no weight is not computed.

    The penalties are on D as a function of what it sees, that is after augmentation and packing.

    Args:
        exact: penalties by double backward; else by finite differences, which need single backward passes only (ZeRO 3).
        packed: images that D judges together.
    """
    adversarial = OBJECTIVES[objective]
    draws = augmentation.draws()

    def shown(images: Tensor, batch: Batch, purpose: str) -> Tensor:
        """What D sees of images (N, C, H, W): (N / packed, packed C, H, W)."""
        if draws:
            images = augment(augmentation, images, batch.uniforms[purpose], batch.weights.get("augment", 0.0))
        return pack(images, packed)

    def discriminator(networks: Networks, batch: Batch) -> Terms:
        with torch.no_grad():
            fake = shown(networks["generator"](batch.latents["discriminator"]).float(), batch, "discriminator fake")
            points = {"real": shown(batch.images, batch, "discriminator real"), "fake": fake}
        weights = {name: weight for name in PENALTIES if (weight := batch.weights.get(name, 0.0))}
        penalised = {PENALTIES[name].at for name in weights}
        if "between" in penalised:
            share = batch.uniforms["discriminator between"][:len(fake), 0].to(fake)
            points["between"] = between(points["real"], fake, share)
        logits, norms = _judge(networks["discriminator"], points, penalised, exact=exact)
        loss = adversarial.discriminator(logits["real"], logits["fake"])
        terms = {"total": loss, "adversarial": loss.detach(),
                 "real_logit": logits["real"].detach().mean(), "fake_logit": logits["fake"].detach().mean()}
        if adversarial.margin:
            terms["real_sign"] = adversarial.margin(logits["real"], logits["fake"]).detach().sign().mean()
        for name, weight in weights.items():
            penalty = PENALTIES[name].value(norms[PENALTIES[name].at]).mean()
            terms["total"] = terms["total"] + weight * penalty
            terms[name] = penalty.detach()
        return terms

    def generator(networks: Networks, batch: Batch) -> Terms:
        fake = shown(networks["generator"](batch.latents["generator"]).float(), batch, "generator fake")
        fake_logits = networks["discriminator"](fake).float()
        real_logits = torch.zeros_like(fake_logits)
        if adversarial.paired:
            with torch.no_grad():
                real_logits = networks["discriminator"](shown(batch.images, batch, "generator real")).float()
        loss = adversarial.generator(real_logits, fake_logits)
        return {"total": loss, "adversarial": loss.detach()}

    return [Phase("discriminator", discriminator, uniforms={"real": draws, "fake": draws, "between": 1}),
            Phase("generator", generator, uniforms={"real": draws, "fake": draws})]


def _judge(network: nn.Module, points: dict[str, Tensor], penalised: AbstractSet[str], *,
           exact: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logits at all points, in float32, and squared gradient norms at those that are penalised.

    What is not penalised is judged apart, which spares it the second backward; by finite differences all is judged together.
    """
    groups = [[point for point in points if point not in penalised], [point for point in points if point in penalised]]
    if penalised and not exact:
        groups = [[], list(points)]
    logits: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}
    for group, differentiated in zip(groups, (False, True), strict=True):
        if not group:
            continue
        images = torch.cat([points[point] for point in group])
        if differentiated and not exact:
            judged, squares = finite_difference_norms(network, images)
        else:
            judged = network(images.requires_grad_(differentiated))
            squares = squared_gradient_norms(judged, images) if differentiated else torch.empty(0)
        logits |= dict(zip(group, judged.float().chunk(len(group)), strict=True))
        if differentiated:
            norms |= dict(zip(group, squares.chunk(len(group)), strict=True))
    return logits, norms
