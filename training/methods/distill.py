"""Feature distillation (a baseline of FreezeD's paper, Mo, Cho and Shin 2020): the discriminator's features of the target's
images stay near those that the source's discriminator gives them, lambda mean (f_t(x) - f_s(x))^2.

f is what D's head sees, and the mean is over images and features. Of the batch the real images serve, as they are before
augmentation. The authors' code has the weight 0 by default; ours is chosen for the features of the models here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from training.config import Config
from training.families import Batch, Networks, Phase
from training.methods.method import Adaptation, Method, discriminator_of, with_term
from training.objectives.packing import pack


class DistillConfig(Config):
    weight: float = Field(1.0, ge=0, description="weight lambda of the mean squared difference of features")


def phases(adaptation: Adaptation) -> Sequence[Phase]:
    """The family's, the discriminator's with the distance of its features from the source's.

    Raises:
        UserError: for a family without a discriminator.
    """
    teacher = discriminator_of(adaptation.source, adaptation, "the method distill keeps the features of").eval()
    config, packed = adaptation.recipe.adaptation.distill, adaptation.recipe.training.objective.pack

    def distance(networks: Networks, batch: Batch) -> Tensor:
        shown = pack(batch.images, packed)
        with torch.no_grad():
            wanted: Tensor = teacher.features(shown)  # type: ignore[operator]  # Module.__getattr__ is untyped
        features: Tensor = networks["discriminator"].features(shown)  # type: ignore[operator]
        return (features.float() - wanted.float()).square().mean()

    return with_term(adaptation.phases, "discriminator", "distill", config.weight, distance)


METHOD = Method(start="pretrain", phases=phases, hyperparameters=("lr", "r1", "distill.weight"))
