"""The adversarial part of CDC (Ojha et al. 2021, "Few-shot image generation via cross-domain correspondence", section 3.2,
equation 4), which RSSA shares: D judges whole images only where latents are near one of a few anchors, as many as support
images, and elsewhere only patches, by a head on features of a low block. So not all latents must become the few images.

The authors take turns, a step of anchors and three of free latents; here each batch holds both in that proportion. Their patch
head looks at a random one of D's low blocks; here at a given one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor, nn

from data_shards.errors import UserError
from training.config import Config
from training.draws import generator as draw
from training.draws import latents
from training.families import Batch, Networks, Phase
from training.families.gan import gan_phases, told
from training.methods.features import outputs_of
from training.methods.method import Adaptation
from training.models.layers import SLOPE, with_options


class AnchorConfig(Config):
    every: int = Field(4, ge=2, description="cdc and rssa: one image of so many comes of an anchor and is judged whole, the "
                                            "others by patches; adaptation.batch is a multiple of it")
    deviation: float = Field(0.1, ge=0, description="cdc and rssa: standard deviation of latents about their anchor")
    patch_blocks: int = Field(2, ge=1, description="cdc and rssa: blocks of D, from the image side, that a patch is judged by; "
                                                   "at most all but the last")


def add_patch_head(networks: Networks, adaptation: Adaptation, method: str) -> None:
    """Give D a head that judges patches, where there is a D.

    Raises:
        UserError: for packs, a batch that does not divide, a family whose D has another use, and a D without feature maps.
    """
    if "discriminator" not in networks:
        return
    recipe = adaptation.recipe
    config, training = recipe.adaptation.anchors, recipe.training
    if training.family != "gan":
        raise UserError(f"the method {method} changes how a GAN's discriminator judges, and the family is {training.family}; "
                        "leave it out of fanout.methods.")
    if training.objective.pack > 1:
        raise UserError(f"the method {method} has D judge patches of single images, and training.objective.pack = "
                        f"{training.objective.pack} packs them; set it to 1 or leave the method out of fanout.methods.")
    check_groups("adaptation.anchors.every", config.every, adaptation, method)
    network = networks["discriminator"]
    features = _probe(network, patch_block(network, config), adaptation)
    if features.dim() != 4:
        raise UserError(f"the method {method} judges patches, which a discriminator of the model {training.generator.model} "
                        "has none of; use a convolutional model, or leave the method out of fanout.methods.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(adaptation.seed, "patch head", 0).initial_seed())
        head = nn.Conv2d(features.shape[1], 1, 1, bias=False)
        nn.init.normal_(head.weight, std=features.shape[1]**-0.5)
        network.patch = with_options(nn.Sequential(nn.LeakyReLU(SLOPE), head), training.discriminator).to(features.device)


def patch_block(network: nn.Module, config: AnchorConfig) -> nn.Module:
    """The block of D whose output the patch head judges."""
    blocks = network.blocks
    assert isinstance(blocks, nn.ModuleList)
    return blocks[max(min(config.patch_blocks, len(blocks) - 1), 1) - 1]


def check_groups(key: str, group: int, adaptation: Adaptation, method: str) -> None:
    """Refuse a batch that does not fall into groups of ``group`` images.

    Raises:
        UserError: with the remedy.
    """
    batch = adaptation.recipe.adaptation.batch
    if batch % group:
        raise UserError(f"the method {method} takes images {group} by {group} ({key}), which adaptation.batch = {batch} is no "
                        f"multiple of; use one of them.")


def anchored_phases(adaptation: Adaptation) -> Sequence[Phase]:
    """A GAN's phases with anchors and patches; another family's own."""
    if "discriminator" not in adaptation.source:
        return adaptation.phases
    recipe = adaptation.recipe
    config = recipe.adaptation.anchors
    anchors = latents(adaptation.seed, "anchors", 0, len(adaptation.support), recipe.training.generator.latent_dim)

    def near_anchors(networks: Networks, batch: Batch, phase: str) -> Tensor:
        """Those of the batch's first ``1 / every`` near an anchor, which each draws for itself; the others as they are."""
        z = batch.latents[phase]
        near = len(z) // config.every
        chosen = (batch.uniforms[f"{phase} anchor"][:near, 0] * len(anchors)).long()
        return torch.cat([anchors[chosen].to(z) + config.deviation * z[:near], z[near:]])

    def judge(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Logits (N, patches): of the first ``1 / every`` that of the whole image, the others of patches. Points that are
        judged together alternate, so that the first are the first of each."""
        with outputs_of([patch_block(network, config)]) as found:
            whole = told(network, images, labels)
        patches: Tensor = network.patch(found[0]).flatten(1)  # type: ignore[operator]  # Module.__getattr__ is untyped
        near = len(images) // config.every
        return torch.cat([whole[:near, None].expand(-1, patches.shape[1]), patches[near:]])

    phases = gan_phases(recipe.training.objective.loss, augmentation=recipe.adaptation.augmentation, codes=near_anchors,
                        judge=judge)
    return [replace(phase, uniforms={**phase.uniforms, "anchor": 1}) for phase in phases]


@torch.no_grad()
def _probe(network: nn.Module, block: nn.Module, adaptation: Adaptation) -> Tensor:
    """What a block of D makes of a few black images; evaluation mode, so that no power iteration moves."""
    place = next(network.parameters()).device
    count = max(adaptation.recipe.training.discriminator.minibatch_std, 1)
    images = torch.zeros(count, *adaptation.support.shape[1:], device=place)
    training = network.training
    network.eval()
    try:
        with outputs_of([block]) as found:
            told(network, images, torch.zeros(count, dtype=torch.long, device=place))
    finally:
        network.train(training)
    return found[0]
