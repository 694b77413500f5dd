"""Meta-training: outer steps over tasks, which are independent of each other and so spread over workers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_shards import ShardSet, batches, episode
from data_shards.errors import UserError
from training.augment import NO_AUGMENTATION
from training.checkpoint import latest_valid, load_checkpoint, prune, save_checkpoint, step_folder
from training.config import content_id, result_fields
from training.corruption import corrupt_source
from training.draws import generator, latents
from training.engines import Engine, EngineConfig, make_engine, whole_weights
from training.events import append_event, cut_events
from training.families import FAMILIES, check_generates
from training.loop import NonFinite, Plan
from training.meta import RULES
from training.meta.config import MetaConfig
from training.meta.rule import Inner, Weights, chosen
from training.networks import best_stem, load_weights, make_networks
from training.optimizers import OptimizerConfig
from training.pictures import generate, save_grid
from training.recipe import TrainingRecipe
from training.schedule import value_at
from training.source import open_cached
from training.wandb_log import open_run
from training.world import World

Progress = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True)
class Task:
    """A source class, and the seed of its support and query sets and of all draws on them."""

    set_path: str
    label: int
    seed: int


@dataclass(frozen=True)
class Shared:
    """What a worker needs beside the task: settings and the shared weights, as state dicts on the CPU."""

    recipe: TrainingRecipe
    weights: Weights


@dataclass(frozen=True)
class TaskResult:
    """On the CPU: what `Rule.gradients` gives, and the networks' buffers after it."""

    gradients: Weights
    buffers: Weights
    metrics: dict[str, float]


MapTasks = Callable[[Callable[[Shared, Task], TaskResult], Shared, list[Task]], Iterable[TaskResult]]
"""Runs tasks and returns their results in the tasks' order; the default runs them one by one here."""


def run_tasks_here(run: Callable[[Shared, Task], TaskResult], shared: Shared, tasks: list[Task]) -> list[TaskResult]:
    return [run(shared, task) for task in tasks]


def run_task(shared: Shared, task: Task) -> TaskResult:
    """The rule's gradients from one task, a pure function of the arguments; the inner optimizers begin afresh."""
    config, training = shared.recipe.meta, shared.recipe.training
    torch.set_num_threads(training.threads)
    source, rule = open_cached(task.set_path), RULES[config.rule]
    support, queries = episode(source, label=task.label, shots=config.shots, queries=config.queries if rule.queries else 0,
                               seed=task.seed)
    networks = make_networks(training, source.manifest.image_shape, 0)
    for name, network in networks.items():
        load_weights(network, shared.weights[name], what=f"the shared {name}")
    read = partial(batches, source, seed=task.seed, streams=1)
    spoilt = partial(corrupt_source, corruption=shared.recipe.data.corruption, seed=shared.recipe.seed,
                     classes=training.generator.classes)
    plan = Plan(until=config.inner_steps * config.inner_batch, batch=config.inner_batch, seed=task.seed,
                latent_dim=training.generator.latent_dim, lr=dict.fromkeys(networks, config.inner_lr),
                weights=training.weights(warm=True), ema_halflife_images=0.0, precision=training.precision)
    gradients, metrics = rule.gradients(Inner(
        networks, FAMILIES[training.family].phases(training.on_one_process(), NO_AUGMENTATION), plan,
        {name: inner_optimizer(config, own) for name, own in training.optimizers().items()}, config.inner_parts,
        support=spoilt(read(batch=config.inner_batch, subset=support)),
        queries=spoilt(read(batch=config.queries, subset=queries)) if rule.queries else iter(()),
        query_count=config.queries))
    buffers = {name: dict(network.named_buffers()) for name, network in networks.items()}
    return TaskResult(_on_cpu(gradients), _on_cpu(buffers), metrics)


def inner_optimizer(config: MetaConfig, own: OptimizerConfig) -> OptimizerConfig:
    """Of the inner loop: Adam with the network's own betas, or gradient descent without momentum."""
    return OptimizerConfig(name=config.inner_optimizer, betas=own.betas if config.inner_optimizer == "adam" else (0.0, 0.0))


def outer_engine(config: MetaConfig, name: str, network: torch.nn.Module, state: Mapping[str, Tensor] | None) -> Engine:
    """The outer optimizer over a network's shared weights; ``state`` is that of a checkpoint."""
    betas = config.outer_betas if config.outer_optimizer == "adam" else (0.0, 0.0)
    return make_engine(name, network, OptimizerConfig(name=config.outer_optimizer, betas=betas), EngineConfig(kind="torch"),
                       World(), batch=1, state=state)


@torch.no_grad()
def outer_step(engines: Mapping[str, Engine], results: Sequence[TaskResult], lr: float) -> float:
    """Step the shared weights by the tasks' mean gradient; buffers become the tasks' mean.

    Sums are in the tasks' order, so that they have the same bits wherever the tasks ran.

    Returns:
        The mean gradient's norm over all networks; where that is not finite, a network's step has changed nothing.
    """
    squares = 0.0
    for name, engine in engines.items():
        for key, parameter in engine.module.named_parameters():
            if key in results[0].gradients[name]:
                assert parameter.grad is not None  # where the engine gathers gradients
                parameter.grad.copy_(_mean([result.gradients[name][key] for result in results]))
        for key, buffer in engine.module.named_buffers():
            values = [result.buffers[name][key] for result in results]
            buffer.copy_(_mean(values) if buffer.is_floating_point() else values[0])
        squares += float(engine.step(lr)) ** 2
    return squares**0.5


def _mean(values: Sequence[Tensor]) -> Tensor:
    total = values[0].clone()
    for value in values[1:]:
        total += value
    return total / len(values)


def meta_id(recipe: TrainingRecipe, start_sha256: str, source: ShardSet) -> str:
    """Identifies the meta-training of ``recipe.meta`` itself; more ``meta.steps`` continue the same one."""
    fields = result_fields(recipe.meta)
    for name in ("steps", "also"):
        fields.pop(name)
    training = result_fields(recipe.training)
    training.pop("images")
    identity = content_id(recipe.seed, fields, training, start_sha256, source.manifest.sha256)
    return f"{recipe.meta.rule}-{identity}"


def check_tasks(recipe: TrainingRecipe, source: ShardSet) -> None:
    """Raises `UserError` when a class of the source cannot be a task of the recipe's meta-training."""
    config, classes = recipe.meta, source.manifest.classes
    if len(classes) < 2:
        raise UserError(f"the source set {source.place} has {len(classes)} classes, and meta-training takes its tasks from "
                        "them; pack it with one subfolder per class, or leave the methods that start from meta-learned weights "
                        "out.")
    labels = source.samples["label"][source.indices()]
    sizes = np.bincount(labels[labels >= 0], minlength=len(classes))
    queries = config.queries if RULES[config.rule].queries else 0
    if config.shots + queries > sizes.min():
        raise UserError(f"meta.shots = {config.shots} and {queries} queries need {config.shots + queries} images of every "
                        f"class, and {source.place} has {sizes.min()} of {classes[int(sizes.argmin())]!r}; ask for fewer.")


def draw_tasks(recipe: TrainingRecipe, source: ShardSet, step: int) -> list[Task]:
    """The tasks of outer step ``step``: no class is drawn again within it before all have been."""
    config = recipe.meta
    classes = len(source.manifest.classes)
    order = torch.randperm(classes, generator=generator(recipe.seed, "meta tasks", step))
    seeds = torch.randint(0, 2**31, (config.tasks,), generator=generator(recipe.seed, "meta support", step))
    return [Task(str(source.path), int(order[i % classes]), int(seeds[i])) for i in range(config.tasks)]


def finished_meta(folder: Path, config: MetaConfig) -> Path | None:
    """The newest checkpoint of a meta-training if it is the last one."""
    newest = latest_valid(folder)
    last = step_folder(folder, config.steps * config.images_per_step)
    return newest if newest and newest.name >= last.name else None


def metatrain(recipe: TrainingRecipe, source: ShardSet, run: Path, start: Path, start_sha256: str, *,
              map_tasks: MapTasks = run_tasks_here, progress: Progress | None = None) -> Path:
    """Meta-train by ``recipe.meta.rule`` from the checkpoint ``start`` on, resuming in ``run/meta/<id>``; returns the last
    checkpoint. Time is counted in images: one outer step sees `MetaConfig.images_per_step` of them.

    Raises:
        UserError: for networks that the rule cannot serve, and inner parts that the networks do not have.
        NonFinite: when the gradients, or the weights, are not finite; no checkpoint holds that.
    """
    check_generates(recipe.training, "this recipe is")
    config, family = recipe.meta, FAMILIES[recipe.training.family]
    names = family.names
    identity = meta_id(recipe, start_sha256, source)
    folder = run / "meta" / identity
    if not config.steps:
        raise UserError("meta.steps is 0, which leaves meta-training out; set it to the outer steps to take.")
    if not family.phases(recipe.training.on_one_process(), NO_AUGMENTATION):
        raise UserError(f"the family {recipe.training.family} takes no steps, so that nothing can be meta-learned; leave "
                        "the methods that start from meta-learned weights out.")
    if done := finished_meta(folder, config):
        return done
    check_tasks(recipe, source)
    networks = make_networks(recipe.training, source.manifest.image_shape, 0)
    RULES[config.rule].refuse(recipe.training.family, networks)
    chosen(networks, config.inner_parts)
    newest, per_step, step = latest_valid(folder), config.images_per_step, 0
    if newest:
        tensors, saved = load_checkpoint(newest)
        step = saved["images"] // per_step
    else:
        tensors, _ = load_checkpoint(start, tuple(best_stem(name) for name in names))
        tensors = {name: tensors[best_stem(name)] for name in names}
    for name in names:
        load_weights(networks[name], tensors[name], what=f"{newest or start}: the {name}")
    engines = {name: outer_engine(config, name, networks[name], tensors.get(f"{name}_optimizer")) for name in names}
    cut_events(folder / "events.jsonl", step * per_step)
    clock, done_before = time.monotonic(), step
    with open_run(recipe.wandb, folder=run, group=recipe.name, job_type="meta", run_id=identity, name=config.rule,
                  settings=recipe.model_dump(mode="json")) as log:
        while step < config.steps:
            shared = Shared(recipe, {name: whole_weights(engine) for name, engine in engines.items()})
            results = list(map_tasks(run_task, shared, draw_tasks(recipe, source, step)))
            norm = outer_step(engines, results, value_at(config.outer_lr, step * per_step))
            step += 1
            images = step * per_step
            _check_finite(norm, engines, images)
            if step % config.report_every_steps == 0 or step == config.steps:
                metrics = {name: sum(result.metrics[name] for result in results) / len(results)
                           for name in results[0].metrics}
                metrics["update_norm"] = norm
                metrics["images_per_second"] = (step - done_before) * per_step / (time.monotonic() - clock)
                append_event(folder / "events.jsonl", stage="meta", trial=identity, images=images, metrics=metrics)
                log.log(metrics, images)
                if progress:
                    progress(step, config.steps, metrics)
            if step % config.snapshot_every_steps == 0 or step == config.steps:
                _snapshot(recipe, source, folder, engines, images, identity)
    return step_folder(folder, config.steps * per_step)


def _check_finite(norm: float, engines: Mapping[str, Engine], images: int) -> None:
    finite = all(bool(torch.isfinite(values).all()) for engine in engines.values() for values in engine.masters())
    if not (math.isfinite(norm) and finite):
        raise NonFinite(f"the meta-learned weights or their gradients are not finite after {images} images; lower "
                        "meta.inner_lr or meta.outer_lr.")


def _snapshot(recipe: TrainingRecipe, source: ShardSet, folder: Path, engines: Mapping[str, Engine], images: int,
              identity: str) -> None:
    tensors = {name: whole_weights(engine) for name, engine in engines.items()}
    tensors["generator_ema"] = tensors["generator"]
    tensors |= {f"{name}_optimizer": found for name, engine in engines.items() if (found := engine.optimizer_state())}
    state: dict[str, Any] = {"images": images, "recipe": recipe.model_dump(mode="json"), "wandb_run_id": identity,
                             "image_shape": list(source.manifest.image_shape),
                             "classes": list(source.manifest.classes) if recipe.training.generator.classes else [],
                             "rng": {"scheme": "sha256(seed/purpose/step)", "seed": recipe.seed}}
    save_checkpoint(step_folder(folder, images), tensors, state)
    prune(folder, recipe.training.keep_checkpoints)
    z = latents(recipe.seed, "samples", 0, 32, recipe.training.generator.latent_dim)
    save_grid(generate(engines["generator"].module, z), folder / "samples.png")


def _on_cpu(named: Mapping[str, Mapping[str, Tensor]]) -> Weights:
    return {name: {key: value.detach().cpu().clone() for key, value in tensors.items()} for name, tensors in named.items()}
