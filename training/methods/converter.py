"""A converter of domains: a CycleGAN (Zhu et al. 2017) between the source set and the support images turns source images into
target images, which then stand in a share of the places of each batch on which G and D are adapted.

The CycleGAN is trained first, from fresh weights, on the first share of the trial's images, and a translated image counts as a
support image does: no trial sees more of them than that of another method. Its translator stays as it then is, in a file of a
search trial's checkpoint: trained again at each rung it would cost as much each time, and on a GPU be another one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import nn

from data_shards import Batch as Images
from data_shards import batches
from data_shards.errors import UserError
from training.config import result_fields
from training.corruption import corrupt_source
from training.draws import generator as draw
from training.engines import EngineConfig, make_engine
from training.families import FAMILIES, Networks
from training.families.cyclegan import CycleganConfig, cyclegan_phases
from training.loop import Plan, State, train
from training.methods.method import Adaptation, Method
from training.methods.stage import whole_batches
from training.models.translation import PatchDiscriminators, Translators
from training.optimizers import OptimizerConfig
from training.pictures import translate
from training.schedule import Schedule, check_schedule, largest_value, value_at
from training.source import open_cached, set_place, source_id, source_parts
from training.world import World, device

if TYPE_CHECKING:
    from training.recipe import TrainingRecipe

BETAS = (0.5, 0.999)  # of Adam in the authors' code


class ConverterConfig(CycleganConfig):
    """The CycleGAN's own settings, and what its translations are used for."""

    share: float = Field(0.25, gt=0, le=0.9, description="share of the trial's images on which the translator is trained; the "
                                                         "generator and the discriminator are adapted on the rest")
    ratio: Schedule = Field(0.5, description="share of each later batch that is translated source images, a number or "
                                             "[[images, value], ...] over the trial's images, those of the translator included")
    channels: int = Field(16, ge=1, description="channels of the translators and of their discriminators at full resolution; "
                                                "the paper has 64")
    lr: Schedule = Field(1e-3, description="learning rate of the translators and of their discriminators; the paper has 2e-4, "
                                           "for far more steps")

    _lr = field_validator("lr")(check_schedule)

    @field_validator("ratio")
    @classmethod
    def _share_of_a_batch(cls, ratio: Schedule) -> Schedule:
        if largest_value(check_schedule(ratio)) > 1:
            raise ValueError("a share of a batch is at most 1")
        return ratio


def add_translator(networks: dict[str, nn.Module], adaptation: Adaptation) -> int:
    """Train a CycleGAN for its share of the images, and add its translator of source images, frozen, as "translator".

    Raises:
        UserError: for a family that does not learn from batches of images, for networks that are told classes, and for a source
            that cannot be read or has images of another shape.
        NonFinite: as `training.loop.train`.
    """
    recipe, (_, channels, height, width) = adaptation.recipe, adaptation.support.shape
    config, family = recipe.adaptation.converter, FAMILIES[recipe.training.family]
    if family.fit or family.drawn:
        raise UserError("the method converter puts translated images into the batches of each step, and the family "
                        f"{recipe.training.family} {'is fitted at once' if family.fit else 'makes no pictures'}; leave it out "
                        "of fanout.methods.")
    if recipe.adaptation.conditional:
        raise UserError("adaptation.conditional tells the networks each image's class, and the translated images of the method "
                        "converter have none; use one of the two.")
    shape = channels, height, width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(adaptation.seed, "converter", 0).initial_seed())
        translators = Translators(shape, config.channels, config.blocks).to(device())
        judges = PatchDiscriminators(shape, config.channels, config.halvings, config.history)
    images = 0
    if not (adaptation.resumed or adaptation.rehearsed):
        images = whole_batches(adaptation, config.share)
        _train({"generator": translators, "discriminator": judges.to(device())}, adaptation, images)
    networks["translator"] = translators.a_to_b.requires_grad_(False)
    return images


def mix(adaptation: Adaptation, networks: Networks, feed: Iterator[Images]) -> Iterator[Images]:
    """The support set's batches with source images, translated, in the places that `translated_places` gives.

    The source images are those at the same places of the source's own batches, whose order is a function of the seed: what a
    batch holds follows from the images seen before it, and from nothing else.
    """
    ratio, sources = adaptation.recipe.adaptation.converter.ratio, None
    for given in feed:
        at, count = given.images_seen - len(given.images), len(given.images)
        sources = sources or source_batches(adaptation, at)
        source, places = next(sources), translated_places(ratio, adaptation.seed, at, count)
        if len(places) == 0:
            yield given
            continue
        images = given.images.index_copy(0, places, translate(networks["translator"], source.images[places]))
        names = np.where(np.isin(np.arange(count), places), source.names, given.names)
        yield replace(given, images=images, labels=given.labels.index_fill(0, places, -1),
                      parts=given.parts.index_fill(0, places, 1), names=names)


def translated_places(ratio: Schedule, seed: int, at: int, batch: int) -> torch.Tensor:
    """Which of the ``batch`` images after ``at`` are translated ones, int64: ratio x batch of them, rounded up as often as
    the fraction says, in places that are drawn anew for each batch, so that packs and groups are mixed."""
    draws = draw(seed, "translated places", at)
    count = int(value_at(ratio, at) * batch + torch.rand((), generator=draws, dtype=torch.float64).item())
    return torch.randperm(batch, generator=draws)[:count].sort().values


def source_batches(adaptation: Adaptation, images: int) -> Iterator[Images]:
    """The source's batches after so many images, of what pretraining reads of it.

    Raises:
        UserError: for a source that cannot be read, or has images of another shape.
    """
    data, shape = adaptation.recipe.data, adaptation.support.shape[1:]
    source = open_cached(set_place(data, data.source))
    if source.manifest.image_shape != shape:
        raise UserError(f"the method converter translates images of the source {source.place}, of shape "
                        f"{source.manifest.image_shape}, into images of the target, of shape {tuple(shape)}; pack one of them "
                        "with the other's --size and --channels.")
    # Not in the order of the support set, which may have been made of the same images.
    seed = draw(adaptation.seed, "converter source", 0).initial_seed()
    feed = batches(source_parts(data, source), batch=adaptation.recipe.adaptation.batch, seed=seed, images_seen=images,
                   streams=data.streams, window=data.window)
    return corrupt_source(feed, data.corruption, adaptation.recipe.seed, adaptation.recipe.training.generator.classes)


def what_it_reads(recipe: TrainingRecipe) -> dict[str, Any]:
    """The source as a trial's id has it: the start's hash covers what it was pretrained on, not what is at ``data.source``."""
    source = open_cached(set_place(recipe.data, recipe.data.source))
    return {"data": {**result_fields(recipe.data), "source": source_id(recipe.data, source)}}


def _train(networks: Mapping[str, nn.Module], adaptation: Adaptation, images: int) -> None:
    """Domain A is the source and B the support set, whose first ``images`` images are seen."""
    recipe, config = adaptation.recipe, adaptation.recipe.adaptation.converter
    batch, optimizer = recipe.adaptation.batch, OptimizerConfig(lr=config.lr, betas=BETAS)
    engines = {name: make_engine(name, network, optimizer, EngineConfig(kind="torch"), World(), batch=batch)
               for name, network in networks.items()}
    plan = Plan(until=images, batch=batch, seed=adaptation.seed, latent_dim=1, lr=dict.fromkeys(networks, config.lr),
                weights={}, ema_halflife_images=0.0, precision=recipe.training.precision)
    train(State(engines, {}), cyclegan_phases(config=config), source_batches(adaptation, 0), plan, batches_b=adaptation.feed(0))
    for engine in engines.values():
        engine.close()


METHOD = Method(start="pretrain", prepare=add_translator, batches=mix, reads=what_it_reads,
                hyperparameters=("lr", "r1", *(f"converter.{name}" for name in ConverterConfig.model_fields)))
