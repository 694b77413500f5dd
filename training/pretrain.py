"""Pretraining of the source model, on any number of ranks, resumable."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_shards import Part, ShardSet, batches
from data_shards.errors import UserError
from data_shards.order import position
from data_shards.parts import chosen_ids
from training.augment import NO_AUGMENTATION, read_strength
from training.checkpoint import images_of, latest_valid, load_checkpoint, read_state, step_folder
from training.config import content_id, result_fields
from training.corruption import corrupt_source
from training.cost import Budget, Clock, blank_batch, cost_metrics, known_flops, peak_flops, timed_collectives
from training.draws import generator as draw
from training.draws import latents
from training.ema import make_average
from training.engines import make_engine
from training.events import append_event, cut_events, read_events
from training.families import FAMILIES
from training.folders import Folder, FolderT, base_name, inside, write_file
from training.health import RollBack, Unhealthy, act, make_watch, observe, safe_images
from training.loop import NonFinite, Plan, State, train
from training.models.translation import Translators
from training.networks import load_weights, make_networks
from training.objectives.packing import check_packing
from training.pictures import above_and_below, generate, grid_png, translate
from training.recipe import TrainingRecipe, check_groups, per_worker_batch
from training.rollback import roll_back, scale_after
from training.schedule import value_at
from training.snapshots import Snapshots, check_metric, checkpoint_parts, report_begun, unreported
from training.source import domain_b, source_id, source_parts, watched_ids
from training.stopping import Stopped, stop_requests
from training.vitals import look, what_to_look_at
from training.wandb_log import open_run
from training.world import World, from_rank_0

logger = logging.getLogger("graft")

Progress = Callable[[int, dict[str, float]], None]


def pretrain_id(recipe: TrainingRecipe, source: ShardSet) -> str:
    """Identifies what is being pretrained; more ``training.images`` continue the same one."""
    fields = result_fields(recipe.training)
    fields.pop("images")
    data = {name: value for name, value in result_fields(recipe.data).items() if name != "corruption" or value}
    return content_id(recipe.seed, fields, data, source_id(recipe.data, source))


def finished_pretraining(recipe: TrainingRecipe, source: ShardSet, folder: FolderT) -> FolderT | None:
    """The checkpoint of a pretraining that has seen all its images, else None.

    Raises:
        UserError: when the folder holds another recipe's pretraining.
    """
    newest = latest_valid(folder)
    if newest is None:
        return None
    state = read_state(newest)
    check_same_pretraining(state, recipe, source, folder)
    whole = -(-recipe.training.images // recipe.training.batch) * recipe.training.batch
    if state["images"] > whole:
        raise UserError(f"{folder} holds a pretraining of {state['images']} images, and {recipe.training.images} are asked "
                        "for; give another --out, or at least as many images.")
    return newest if state["images"] >= recipe.training.images else None


def check_same_pretraining(state: dict[str, Any], recipe: TrainingRecipe, source: ShardSet, folder: Folder) -> None:
    if state["pretrain_id"] != pretrain_id(recipe, source):
        raise UserError(f"{folder} holds a pretraining by other settings or on other data; give another --out or remove it.")


def newest_checkpoint(folder: FolderT, world: World) -> FolderT | None:
    """The newest whole checkpoint; rank 0 looks, lest ranks find different ones while a killed run's writer still ends."""

    def look() -> int | None:
        newest = latest_valid(folder)
        return images_of(newest) if newest else None

    images = from_rank_0(look, world)
    return None if images is None else step_folder(folder, images)


def make_plan(recipe: TrainingRecipe) -> Plan:
    config = recipe.training
    return Plan(until=config.images, batch=config.batch, seed=recipe.seed, latent_dim=config.generator.latent_dim,
                lr={name: optimizer.lr for name, optimizer in config.optimizers().items()},
                weights=config.weights(), augmentation=config.augmentation,
                every={name: optimizer.every for name, optimizer in config.optimizers().items()},
                accumulation=config.engine.accumulation, rescues=config.rescues,
                ema_halflife_images=config.ema_halflife_images, precision=config.precision,
                report_every_images=config.report_every_images, snapshot_every_images=config.snapshot_every_images)


def check_classes(recipe: TrainingRecipe, source: ShardSet) -> None:
    """Raises `UserError` when conditional networks are not told the classes of one labelled source."""
    told, there = recipe.training.generator.classes, len(source.manifest.classes)
    if told and recipe.data.mix:
        raise UserError(f"training.generator.classes = {told} needs the classes of one set, and data.mix names more; leave "
                        "data.mix out, or set it to 0.")
    if told and told != there:
        raise UserError(f"training.generator.classes = {told}, and the source {source.path} has {there} classes; set it to "
                        f"{there}, or to 0 for a generator that is told none.")


def pretrain(recipe: TrainingRecipe, source: ShardSet, run: FolderT, world: World, progress: Progress | None = None,
             step: Callable[[int], None] | None = None) -> FolderT:
    """`train_on`, and again from an earlier checkpoint where the recipe's health section wants a rollback.

    Raises:
        Stopped: when SIGTERM or the file `stopping.STOP_FILE` asked for it; there is a checkpoint of that moment.
        Unhealthy: when an alarm ends the run, or no checkpoint is from before it.
    """
    while True:
        try:
            return train_on(recipe, source, run, world, progress, step)
        except RollBack as reason:
            roll_back(inside(run, "pretrain"), reason.alarm, recipe.training.health, world)


def train_on(recipe: TrainingRecipe, source: ShardSet, run: FolderT, world: World, progress: Progress | None = None,
             step: Callable[[int], None] | None = None) -> FolderT:
    """Train until the recipe's images are seen, from the newest good checkpoint in ``run/pretrain`` on; returns the last one.

    Every rank calls it. Progress gets images seen and the metrics of each report on rank 0; ``step`` gets the images seen
    before each step, on every rank.

    Raises:
        Stopped: when SIGTERM or the file `stopping.STOP_FILE` asked for it; there is a checkpoint of that moment.
        NotWritten: when a checkpoint could not be written.
        Unhealthy: when an alarm ends the run, or rolls it back.
    """
    config = recipe.training
    torch.set_num_threads(config.threads)
    parts, second = source_parts(recipe.data, source), domain_b(recipe.data, source)
    local_batch = per_worker_batch(config.batch, world.size, recipe.data.streams, config.engine.accumulation)
    check_packing("training.batch", config.batch, world.size * config.engine.accumulation, config.objective.pack)
    check_groups("training.batch", config.batch, world.size * config.engine.accumulation, config)
    check_classes(recipe, source)
    folder = inside(run, "pretrain")
    newest = newest_checkpoint(folder, world)
    tensors, saved = load_checkpoint(newest) if newest else ({}, {"images": 0, "wandb_run_id": None})
    if newest:
        check_same_pretraining(saved, recipe, source, folder)

    networks = make_networks(config, source.manifest.image_shape, recipe.seed)
    if newest:
        for name, network in networks.items():
            load_weights(network, tensors[name], what=f"{newest}/{name}.safetensors")
    family, plan = FAMILIES[config.family], make_plan(recipe)
    phases = family.phases(config, config.augmentation)
    counted = family.phases(config, NO_AUGMENTATION)  # it works element by element, mostly
    blank = blank_batch(counted, source.manifest.image_shape, plan.latent_dim,
                        {name: value_at(weight, 0) for name, weight in plan.weights.items()}, local_batch,
                        two_sets=second is not None)
    budget = Budget(known_flops(counted, networks, blank, plan.every) / local_batch, *peak_flops(config.precision))
    optimizers = config.optimizers()
    engines = {name: make_engine(name, network, optimizers[name], config.engine, world, batch=local_batch,
                                 precision=config.precision, state=tensors.get(f"{name}_optimizer"))
               for name, network in networks.items()}
    state = State(engines, {"generator": make_average(engines["generator"], tensors.get("generator_ema"))},
                  images=int(saved["images"]), lr_scale=saved.get("lr_scale", 1.0), rescues=saved.get("rescues", 0),
                  strength=read_strength(saved.get("augmentation")), **report_begun(saved, world))

    lead = world.rank == 0
    if lead and newest:
        logger.info("goes on from %d images", state.images)
    identity = pretrain_id(recipe, source)
    events = inside(folder, "events.jsonl")
    snapshots = Snapshots(folder, world, resumed=state.images, keep=config.keep_checkpoints, best=config.keep_best,
                          better=config.keep_best_is)
    newest_metrics: dict[str, float] = saved.get("metrics") or {}
    reals = torch.empty(0)
    if lead:
        cut_events(events, state.images)
        reals = next(batches(source, batch=32, seed=recipe.seed, streams=1)).images
        write_file(folder, "reals.png", grid_png(family.pictures(config, reals)))
    watch = make_watch(config.health, from_rank_0(lambda: read_events(events), world))
    state.lr_scale = scale_after(watch.events, state.images, state.lr_scale)
    looked = what_to_look_at(source, *watched_ids(recipe.data, source), images=config.health.images, seed=recipe.seed,
                             latent_dim=plan.latent_dim, packed=config.objective.pack
                             ) if config.health.every_images and not family.translates else None
    # W&B's own files need a folder of this machine.
    wandb_folder = run if isinstance(run, Path) else Path("runs", base_name(run)).resolve()
    wandb_run = open_run(recipe.wandb, folder=wandb_folder, group=recipe.name, job_type="pretrain",
                         run_id=f"pretrain-{identity}", name="pretrain",
                         settings=recipe.model_dump(mode="json")) if lead else None

    def where(images: int) -> dict[str, int]:
        """Of a single set, pass and samples; a mixture's parts each have passes of their own, that follow from the clock."""
        return position(images, len(chosen_ids(parts[0]))) if len(parts) == 1 else {"images": images}

    reported = state.images - state.steps * config.batch  # as before a kill, so that health is looked at in the same reports
    measured = state.images

    def report(state: State, metrics: dict[str, float]) -> None:
        nonlocal reported, measured
        if looked and state.images // config.health.every_images > reported // config.health.every_images:
            with clock.timed("health"):
                metrics |= look(looked, state.networks, world, local_batch // plan.accumulation, config.precision)
        metrics |= cost_metrics(clock, budget, state.images - measured, world)
        flags, news = observe(watch, state.images, metrics)
        metrics |= flags
        reported = measured = state.images
        check_metric(config.keep_best, metrics)
        newest_metrics.clear()
        newest_metrics.update(metrics)
        if lead:
            for sentence in news:
                logger.warning("%s", sentence)
            write = partial(append_event, events, stage="pretrain", images=state.images, metrics=metrics, seconds=time.time())
            if isinstance(events, Path):
                write()
            else:
                snapshots.later(write)  # a store may take its time
            if wandb_run:
                wandb_run.log(metrics, state.images)
                for sentence in news:
                    wandb_run.alert("graft health", sentence)
            if progress:
                progress(state.images, metrics)
        act(watch)

    def snapshot(state: State) -> None:
        with clock.timed("checkpoint"):
            begin_checkpoint(state)

    def begin_checkpoint(state: State) -> None:
        share = snapshots.gather(checkpoint_parts(state), {"generator_ema": 0})
        samples = None
        if lead:
            pictured = make_networks(config, source.manifest.image_shape, recipe.seed)["generator"]
            load_weights(pictured, share["generator_ema"], what="the generator's average")
            if isinstance(pictured, Translators):
                samples = grid_png(above_and_below(reals, translate(pictured.a_to_b, reals)))
            else:
                z = latents(recipe.seed, "samples", 0, 32, config.generator.latent_dim)
                samples = grid_png(family.pictures(config, generate(pictured, z)))
        snapshots.save(
            state.images, share,
            {"images": state.images, "pretrain_id": identity, "recipe": recipe.model_dump(mode="json"),
             "image_shape": list(source.manifest.image_shape),
             "classes": list(source.manifest.classes) if config.generator.classes else [],
             "data_position": where(state.images),
             "rng": {"scheme": "sha256(seed/purpose/images)", "seed": recipe.seed},
             "lr_scale": state.lr_scale, "rescues": state.rescues, "augmentation": state.strength.as_json(),
             "world_size": world.size, "wandb_run_id": f"pretrain-{identity}", "metrics": dict(newest_metrics),
             "unreported": unreported(state, world)},
            {"samples.png": samples} if samples else {}, safe=safe_images(watch.events, config.health))
        if wandb_run and samples:
            wandb_run.log_image("samples", samples)

    fed = partial(batches, batch=config.batch, rank=world.rank, world=world.size, images_seen=state.images,
                  workers=recipe.data.workers, streams=recipe.data.streams, window=recipe.data.window,
                  pin_memory=torch.cuda.is_available())
    feed = corrupt_source(fed(parts, seed=recipe.seed), recipe.data.corruption, recipe.seed, config.generator.classes)
    # Of another seed: the same order would pair the images of two sets that were made of the same ones.
    feed_b = fed(second, seed=draw(recipe.seed, "domain b", 0).initial_seed()) if second else None
    try:
        clock = Clock()
        with stop_requests(folder) as stop, timed_collectives(clock):
            if family.fit and state.images < config.images:
                state.images = -(-config.images // config.batch) * config.batch
                began, images = time.monotonic(), first_images(recipe, parts, min(config.images, config.density.images))
                found = family.fit(networks["generator"], config, images, recipe.seed)
                report(state, found | {"images_per_second": len(images) / (time.monotonic() - began)})
                snapshot(state)
            train(state, phases, _noted(clock.each("data", feed), state, step), plan, world=world, report=report,
                  batches_b=clock.each("data", feed_b) if feed_b else None, snapshot=snapshot, stop=stop,
                  between=snapshots.settle)
        snapshots.wait()
    except (Stopped, NonFinite, Unhealthy):  # on all ranks alike
        snapshots.wait()
        raise
    finally:
        snapshots.close()
        for engine in state.engines.values():
            engine.close()
        if wandb_run:
            wandb_run.finish()
    return step_folder(folder, state.images)


def first_images(recipe: TrainingRecipe, parts: list[Part], count: int) -> Tensor:
    """The first ``count`` images of the data order, uint8 (count, C, H, W), whole on every rank."""
    data, batch = recipe.data, recipe.training.batch
    feed = batches(parts, batch=batch, seed=recipe.seed, workers=data.workers, streams=data.streams, window=data.window)
    feed = corrupt_source(feed, data.corruption, recipe.seed, recipe.training.generator.classes)
    return torch.cat([next(feed).images for _ in range(-(-count // batch))])[:count]


def _noted(feed: Iterator[Any], state: State, step: Callable[[int], None] | None) -> Iterator[Any]:
    for batch in feed:
        if step:
            step(state.images)
        yield batch
