"""FreezeD (Mo, Cho and Shin 2020): the discriminator's lowest blocks, at the image's side, stay as the source left them."""

from __future__ import annotations

from torch import nn

from data_shards.errors import UserError
from training.families import Networks
from training.methods.method import Adaptation, Method


def freeze_lowest_blocks(networks: Networks, adaptation: Adaptation) -> None:
    """Freeze ``adaptation.frozen_blocks`` blocks of D.

    Raises:
        UserError: for a family without a discriminator, or when it has no more than that many blocks.
    """
    if "discriminator" not in networks:
        raise UserError(f"the method freezed freezes a discriminator, which the family {adaptation.recipe.training.family} has "
                        "none of; leave it out of fanout.methods.")
    blocks, count = networks["discriminator"].blocks, adaptation.recipe.adaptation.frozen_blocks
    assert isinstance(blocks, nn.ModuleList)
    if not 0 < count <= len(blocks):
        raise UserError(f"adaptation.frozen_blocks = {count} does not fit a discriminator of {len(blocks)} blocks; use 1 to "
                        f"{len(blocks)}.")
    for block in list(blocks)[:count]:
        block.requires_grad_(False)


METHOD = Method(start="pretrain", prepare=freeze_lowest_blocks, hyperparameters=("lr", "r1", "frozen_blocks"))
