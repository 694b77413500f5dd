"""Fine-tuning with parts of the generator as the source left them: its mapping, its coarser blocks or its finer ones.

The mirror of FreezeD (Mo, Cho and Shin 2020): where the target shares the source's composition but not its texture, the early
layers stay, and where it is the other way round, the late ones. The parts are those of ``parts()`` of each model.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from data_shards.errors import UserError
from training.config import Config
from training.families import Networks
from training.methods.method import Adaptation, Method
from training.models.layers import Parts


class FreezegConfig(Config):
    parts: tuple[Literal["mapping", "early", "late"], ...] = Field(
        ("mapping", "early"), min_length=1,
        description="parts of the generator that stay fixed: mapping (before the first feature map), early (the coarser half "
                    "of its blocks), late (the finer half and what makes the image)")


def freeze_parts(networks: Networks, adaptation: Adaptation) -> None:
    """Freeze ``adaptation.freezeg.parts`` of G.

    Raises:
        UserError: for a generator without parts, when those named hold no weights, or hold all that there are.
    """
    chosen, generator = adaptation.recipe.adaptation.freezeg.parts, networks["generator"]
    if not hasattr(generator, "parts"):
        raise UserError("the method freezeg freezes a generator's mapping, early or late layers, which that of the family "
                        f"{adaptation.recipe.training.family} is not divided into; leave it out of fanout.methods.")
    parts: Parts = generator.parts()  # type: ignore[operator]  # Module.__getattr__ is untyped
    weights = [p for name in chosen for module in getattr(parts, name) for p in module.parameters()]
    for parameter in weights:
        parameter.requires_grad_(False)
    if not weights or not any(p.requires_grad for p in generator.parameters()):
        raise UserError(f"adaptation.freezeg.parts = {', '.join(chosen)} holds {'all' if weights else 'no'} weights of the "
                        f"generator {adaptation.recipe.training.generator.model}; choose others of mapping, early and late.")


METHOD = Method(start="pretrain", prepare=freeze_parts, hyperparameters=("lr", "r1", "freezeg.parts"))
