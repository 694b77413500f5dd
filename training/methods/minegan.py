"""MineGAN (Wang et al. 2020, "MineGAN: effective knowledge transfer from GANs to target domains with few images", section 3):
a miner before the frozen G is trained against D (equations 2 and 3), then miner, G and D are fine-tuned together.

The miner is a part of the generator (`training.generator.miner_layers`), so that its checkpoints are sampled and scored as any
other's. Its own stage is the first share of the trial's images; a share of 1 leaves G frozen to the end ("w/o FT").
"""

from __future__ import annotations

from pydantic import Field

from training.config import Config
from training.families import Networks
from training.methods.method import Adaptation, Method
from training.methods.stage import train_stage, whole_batches


class MineganConfig(Config):
    share: float = Field(0.25, ge=0, le=1, description="share of the trial's images on which the miner and D train while G is "
                                                       "frozen; 1: G is not fine-tuned at all")


def mine(networks: Networks, adaptation: Adaptation) -> int:
    """Train the miner alone for its share of the images; the recipe has seen to it that G has one."""
    generator, share = networks["generator"], adaptation.recipe.adaptation.minegan.share
    images = 0
    if share > 0:
        generator.requires_grad_(False)
        generator.miner.requires_grad_(True)
    if 0 < share < 1:
        if not adaptation.resumed:
            images = train_stage(networks, adaptation, whole_batches(adaptation, share))
        generator.requires_grad_(True)
    return images


METHOD = Method(start="pretrain", prepare=mine, settings={"training.generator.miner_layers": 2},
                hyperparameters=("lr", "r1", "minegan.share"))
