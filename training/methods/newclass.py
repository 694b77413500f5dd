"""Few-shot by condition: a class-conditional source is told of the target's classes as new ones, and only what the networks
know of a class is learned from the few images. No meta-training is in it, though the source has seen hundreds of classes, so it
is what meta-learning on the same classes has to beat.

The rows of a new class begin at the mean of the source's (`training.transplant`); of G only they train, of D everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from data_shards.errors import UserError
from training.config import Config
from training.families import Networks
from training.methods.method import Adaptation, Method
from training.transplant import CLASS_TABLE

if TYPE_CHECKING:
    from training.recipe import TrainingRecipe


class NewclassConfig(Config):
    rate: float = Field(10.0, gt=0, description="learning rate of G's class tables over adaptation.lr: a row is few numbers, "
                                                "and has few steps to get from the mean of all classes to one of its own")


class Quickened(nn.Module):
    """W -> W_o + rate (W - W_o): a step of the optimizer on W is ``rate`` times as long on what the layer reads."""

    start: Tensor

    def __init__(self, start: Tensor, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("start", start.detach().clone())

    def forward(self, weight: Tensor) -> Tensor:
        return torch.lerp(self.start, weight, self.rate) if self.rate != 1 else weight


def tables_of(network: nn.Module) -> list[nn.Module]:
    """The layers that have a row for each class."""
    return [module for name, module in network.named_modules() if name.rpartition(".")[2] == CLASS_TABLE]


def leave_tables(networks: Networks, adaptation: Adaptation) -> None:
    """Freeze all of G but its class tables."""
    generator, rate = networks["generator"], adaptation.recipe.adaptation.newclass.rate
    generator.requires_grad_(False)
    for table in tables_of(generator):
        table.requires_grad_(True)
        weight = table.weight
        assert isinstance(weight, Tensor)
        parametrize.register_parametrization(table, "weight", Quickened(weight, rate))


def told(recipe: TrainingRecipe) -> Mapping[str, Any]:
    """The trial's networks are told the target's classes.

    Raises:
        UserError: for a source that was told none.
    """
    if not recipe.training.generator.classes:
        raise UserError("the method newclass adds classes to a source that was told its own, and training.generator.classes is "
                        "0; set it to the number of the source's classes, or leave the method out of fanout.methods.")
    return {"adaptation.conditional": True}


METHOD = Method(start="pretrain", prepare=leave_tables, derived=told, hyperparameters=("lr", "r1", "newclass.rate"))
