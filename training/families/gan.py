"""Generative adversarial networks: a discriminator's and a generator's step."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor, nn

from training.augment import NO_AUGMENTATION, AugmentConfig, augment
from training.families.family import Family
from training.families.phase import Batch, Networks, Phase, Terms
from training.models import make_gan
from training.objectives import OBJECTIVES, PENALTIES
from training.objectives.packing import pack
from training.objectives.penalties import between, finite_difference_norms, squared_gradient_norms

Judge = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""D, images (N, C, H, W), classes (N,) -> logits (N,), or (N, P) for P places of each image."""


Codes = Callable[[Networks, Batch, str], Tensor]
"""The latents (N, latent_dim) whose images are the fakes of a phase, named by its network."""


def from_the_prior(networks: Networks, batch: Batch, phase: str) -> Tensor:
    return batch.latents[phase]


def told(network: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """What a network makes of ``inputs``; a conditional one is told their classes."""
    outputs: Tensor = network(inputs, labels) if _is_told(network) else network(inputs)
    return outputs


def gan_phases(objective: str, *, exact: bool = True, packed: int = 1, augmentation: AugmentConfig = NO_AUGMENTATION,
               codes: Codes = from_the_prior, judge: Judge = told) -> list[Phase]:
    """Discriminator, then generator. The batch's ``weights`` hold the penalties', named as in `PENALTIES`, and "augment",
    the augmentation's probability; what has no weight is not computed.

    The penalties are on D as a function of what it sees, that is after augmentation and packing.

    Args:
        exact: penalties by double backward; else by finite differences, which need single backward passes only (ZeRO 3).
        packed: images that D judges together.
        codes: of the fakes.
        judge: how D judges; under ``exact`` only. A penalty is on the mean over the places of an image.
    """
    assert exact or judge is told
    adversarial = OBJECTIVES[objective]
    draws = augmentation.draws()

    def shown(images: Tensor, batch: Batch, purpose: str) -> Tensor:
        """What D sees of images (N, C, H, W): (N / packed, packed C, H, W)."""
        if draws:
            images = augment(augmentation, images, batch.uniforms[purpose], batch.weights.get("augment", 0.0))
        return pack(images, packed)

    def discriminator(networks: Networks, batch: Batch) -> Terms:
        with torch.set_grad_enabled(batch.through):
            fake = told(networks["generator"], codes(networks, batch, "discriminator"), batch.labels).float()
            fake = shown(fake, batch, "discriminator fake")
            points = {"real": shown(batch.images, batch, "discriminator real"), "fake": fake}
        weights = {name: weight for name in PENALTIES if (weight := batch.weights.get(name, 0.0))}
        penalised = {PENALTIES[name].at for name in weights}
        if "between" in penalised:
            share = batch.uniforms["discriminator between"][:len(fake), 0].to(fake)
            points["between"] = between(points["real"], fake, share)
        logits, norms = _judge(networks["discriminator"], points, batch.labels, penalised, exact=exact, judge=judge)
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
        fake = told(networks["generator"], codes(networks, batch, "generator"), batch.labels).float()
        fake_logits = judge(networks["discriminator"], shown(fake, batch, "generator fake"), batch.labels).float()
        real_logits = torch.zeros_like(fake_logits)
        if adversarial.paired:
            with torch.set_grad_enabled(batch.through):
                real = shown(batch.images, batch, "generator real")
                real_logits = judge(networks["discriminator"], real, batch.labels).float()
        loss = adversarial.generator(real_logits, fake_logits)
        return {"total": loss, "adversarial": loss.detach()}

    return [Phase("discriminator", discriminator, uniforms={"real": draws, "fake": draws, "between": 1}),
            Phase("generator", generator, uniforms={"real": draws, "fake": draws})]


def _is_told(network: nn.Module) -> bool:
    return bool(getattr(network, "classes", 0))


def _judge(network: nn.Module, points: dict[str, Tensor], labels: Tensor, penalised: AbstractSet[str], *,
           exact: bool, judge: Judge) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logits at all points, in float32, and squared gradient norms at those that are penalised.

    What is not penalised is judged apart, which spares it the second backward; by finite differences all is judged together.
    Points judged together alternate, so that D's layers over several samples, which take those n / group apart, see one kind.
    """
    groups = [[point for point in points if point not in penalised], [point for point in points if point in penalised]]
    if penalised and not exact:
        groups = [[], list(points)]
    logits: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}
    for group, differentiated in zip(groups, (False, True), strict=True):
        if not group:
            continue
        images = torch.stack([points[point] for point in group], 1).flatten(0, 1)
        classes = labels.repeat_interleave(len(group))
        if differentiated and not exact:
            judged, squares = finite_difference_norms(network, images, classes if _is_told(network) else None)
        else:
            judged = judge(network, images.requires_grad_() if differentiated else images, classes)
            one_each = judged if judged.dim() == 1 else judged.mean(1)
            squares = squared_gradient_norms(one_each, images) if differentiated else torch.empty(0)
        logits |= dict(zip(group, judged.float().unflatten(0, (-1, len(group))).unbind(1), strict=True))
        if differentiated:
            norms |= dict(zip(group, squares.unflatten(0, (-1, len(group))).unbind(1), strict=True))
    return logits, norms


GAN = Family(
    names=("generator", "discriminator"),
    networks=lambda config, shape: make_gan(config.generator, config.discriminator, shape, config.objective.pack),
    phases=lambda config, augmentation: gan_phases(config.objective.loss, exact=config.exact_penalties,
                                                   packed=config.objective.pack, augmentation=augmentation),
    shown={"D": "discriminator/adversarial", "G": "generator/adversarial"})
