"""CycleGAN (Zhu et al. 2017): translation between two sets of images, no two of which belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from training.config import Config
from training.families.family import Family
from training.families.phase import Batch, Networks, Phase, Terms
from training.models.layers import Shape, with_options
from training.models.translation import PatchDiscriminators, Translators
from training.objectives import OBJECTIVES
from training.objectives.adversarial import Loss
from training.world import World, rows_of_all

if TYPE_CHECKING:
    from training.recipe import TrainingConfig

SQUARES = 2.0
"""Zhu et al. give the generators (D(G(x)) - 1)^2, of which Mao et al., as `objectives.adversarial` has it, take half."""


class CycleganConfig(Config):
    """The networks have ``generator.channels`` and ``discriminator.channels``; other settings of shapes are not theirs."""

    blocks: int = Field(6, ge=1, description="residual blocks of a translator; the paper has 6 up to 128 px, 9 above")
    halvings: int = Field(3, ge=1, description="layers of stride 2 in a discriminator, whose patch is 70 px with 3, 34 with 2")
    cycle: float = Field(10.0, ge=0, description="weight lambda of the mean absolute difference between an image and itself "
                                                 "translated there and back; the adversarial loss is scaled to the paper's")
    identity: float = Field(0.5, ge=0, description="weight, as a share of `cycle`, of the mean absolute difference between an "
                                                   "image and its translation into the domain that it is from")
    history: int = Field(50, ge=1, description="earlier translations of each kind that the discriminators are shown too")


def cyclegan_phases(objective: str = "least_squares", config: CycleganConfig | None = None) -> list[Phase]:
    """Generator, then discriminator, as in the authors' code. Domain A is the batch's ``images``, B its ``images_b``."""
    adversarial, config = OBJECTIVES[objective], config or CycleganConfig()

    def generator(networks: Networks, batch: Batch) -> Terms:
        translate, judge, (a, b) = networks["generator"], networks["discriminator"], _domains(batch)
        if config.identity:
            as_b, as_a = translate(torch.cat([a, b]), torch.cat([b, a]))
            (fake_b, same_b), (fake_a, same_a) = as_b.float().chunk(2), as_a.float().chunk(2)
        else:
            fake_b, fake_a = (made.float() for made in translate(a, b))
            same_a, same_b = a, b
        again_b, again_a = translate(fake_a, fake_b)
        fake_logits = [logits.float() for logits in judge(fake_a, fake_b)]
        real_logits = [torch.zeros_like(logits) for logits in fake_logits]
        if adversarial.paired:
            with torch.no_grad():
                real_logits = [logits.float() for logits in judge(a, b)]
        terms = {"adversarial": _both(adversarial.generator, real_logits, fake_logits),
                 "cycle": l1_loss(again_a.float(), a) + l1_loss(again_b.float(), b),
                 "identity": l1_loss(same_a, a) + l1_loss(same_b, b)}
        total = SQUARES * terms["adversarial"] + config.cycle * (terms["cycle"] + config.identity * terms["identity"])
        return {"total": total, **{name: term.detach() for name, term in terms.items()}}

    @torch.no_grad()
    def with_history(networks: Networks, batch: Batch, world: World) -> Batch:
        """What the discriminators see of the generators' images, exchanged over the global batch."""
        judge, (a, b) = networks["discriminator"], _domains(batch)
        assert isinstance(judge, PatchDiscriminators)
        fake_b, fake_a = networks["generator"](a, b)
        shown = {}
        for name, fake, history in (("a", fake_a, judge.history_a), ("b", fake_b, judge.history_b)):
            draws = batch.uniforms[f"discriminator history {name}"].to(fake.device)
            shown[name] = world.slice(history.exchange(rows_of_all(fake.float(), world), rows_of_all(draws, world)))
        return replace(batch, prepared=shown)

    def discriminator(networks: Networks, batch: Batch) -> Terms:
        shown, (a, b) = batch.prepared, _domains(batch)
        logits = networks["discriminator"](torch.cat([a, shown["a"]]), torch.cat([b, shown["b"]]))
        real, fake = zip(*(each.float().chunk(2) for each in logits), strict=True)
        loss = _both(adversarial.discriminator, real, fake)
        return {"total": loss, "adversarial": loss.detach(), "real_logit": torch.cat(real).detach().mean(),
                "fake_logit": torch.cat(fake).detach().mean()}

    return [Phase("generator", generator),
            Phase("discriminator", discriminator, uniforms={"history a": 2, "history b": 2}, prepare=with_history)]


def cyclegan_networks(config: TrainingConfig, shape: Shape) -> dict[str, nn.Module]:
    """Both translators as "generator", both patch discriminators as "discriminator"."""
    own = config.cyclegan
    judge = PatchDiscriminators(shape, config.discriminator.channels, own.halvings, own.history)
    return {"generator": Translators(shape, config.generator.channels, own.blocks),
            "discriminator": with_options(judge, config.discriminator)}


def refuse(config: TrainingConfig) -> None:
    """Raises `ValueError` for what CycleGAN has not: penalties, packs, classes, augmentation, minibatch deviation."""
    if config.objective.penalised:
        raise ValueError("the family cyclegan has no gradient penalties; set objective: {loss: least_squares, r1: 0, r2: 0}")
    told = {"objective.pack over 1": config.objective.pack > 1, "generator.classes": config.generator.classes > 0,
            "discriminator.minibatch_std": config.discriminator.minibatch_std > 0,
            "an augmentation": config.augmentation.draws() > 0}
    for setting, there in told.items():
        if there:
            raise ValueError(f"the family cyclegan has no use for {setting}; leave it out")


def _domains(batch: Batch) -> tuple[Tensor, Tensor]:
    assert batch.images_b is not None, "the recipe is checked to have data.translate_to"
    return batch.images, batch.images_b


def _both(loss: Loss, real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """The sum over the two domains."""
    first, second = (loss(*logits) for logits in zip(real, fake, strict=True))
    return first + second


CYCLEGAN = Family(
    names=("generator", "discriminator"),
    networks=cyclegan_networks,
    phases=lambda config, augmentation: cyclegan_phases(config.objective.loss, config.cyclegan),
    shown={"D": "discriminator/adversarial", "G": "generator/adversarial", "cycle": "generator/cycle"},
    translates=True,
    differentiable=False,  # D sees earlier translations
    refuse=refuse)
