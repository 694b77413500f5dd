"""FreezeD (Mo, Cho and Shin 2020): the discriminator's lowest blocks, at the image's side, stay as the source left them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from data_shards.errors import UserError
from training.families import Networks
from training.methods.method import Method

if TYPE_CHECKING:
    from training.recipe import AdaptationConfig


def freeze_lowest_blocks(networks: Networks, config: AdaptationConfig) -> None:
    """Freeze ``config.frozen_blocks`` blocks of D.

    Raises:
        UserError: when D has no more than that many blocks.
    """
    blocks = networks["discriminator"].blocks
    assert isinstance(blocks, nn.ModuleList)
    if not 0 < config.frozen_blocks <= len(blocks):
        raise UserError(f"adaptation.frozen_blocks = {config.frozen_blocks} does not fit a discriminator of {len(blocks)} "
                        f"blocks; use 1 to {len(blocks)}.")
    for block in list(blocks)[:config.frozen_blocks]:
        block.requires_grad_(False)


METHOD = Method(start="pretrain", prepare=freeze_lowest_blocks, hyperparameters=("lr", "r1", "frozen_blocks"))
