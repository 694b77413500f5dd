"""Reptile over GAN tasks (Nichol et al. 2018, algorithm 1; for GANs FIGR, Clouatre and Demers 2019): adapt to one class for a
few steps, move the shared weights towards where each task ended. Tasks are independent, so they spread over workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_shards import ShardSet, batches, episode
from data_shards.errors import UserError
from training.augment import NO_AUGMENTATION
from training.checkpoint import latest_valid, load_checkpoint, prune, save_checkpoint, step_folder
from training.config import content_id, result_fields
from training.draws import generator, latents
from training.engines import EngineConfig, make_engine
from training.events import append_event, cut_events
from training.families import FAMILIES, check_generates
from training.loop import NonFinite, Plan, State, train
from training.networks import best_stem, load_weights, make_networks
from training.optimizers import OptimizerConfig
from training.pictures import generate, save_grid
from training.recipe import TrainingRecipe
from training.schedule import value_at
from training.source import open_cached
from training.wandb_log import open_run
from training.world import World

Weights = dict[str, dict[str, Tensor]]
"""Network name -> parameter name -> tensor on the CPU."""
Progress = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True)
class Task:
    """One inner loop: a source class, its support draw, and where in meta-training it stands."""

    set_path: str
    label: int
    seed: int


@dataclass(frozen=True)
class InnerLoop:
    """What a worker needs beside the task: settings and the shared weights."""

    recipe: TrainingRecipe
    weights: Weights


MapTasks = Callable[[Callable[[InnerLoop, Task], "TaskResult"], InnerLoop, list[Task]], Iterable["TaskResult"]]
"""Runs the inner loop over tasks and returns the results in their order; the default runs them one by one here."""


@dataclass(frozen=True)
class TaskResult:
    weights: Weights
    metrics: dict[str, float]


def run_tasks_here(inner: Callable[[InnerLoop, Task], TaskResult], loop: InnerLoop, tasks: list[Task]) -> list[TaskResult]:
    return [inner(loop, task) for task in tasks]


def adapt_to_task(loop: InnerLoop, task: Task) -> TaskResult:
    """``inner_steps`` steps of G and D with fresh optimizers on the task's support images; the weights it ends with."""
    config, training = loop.recipe.meta, loop.recipe.training
    torch.set_num_threads(training.threads)
    source = open_cached(task.set_path)
    support, _ = episode(source, label=task.label, shots=config.shots, queries=0, seed=task.seed)
    networks = make_networks(training, source.manifest.image_shape, 0)
    for name, network in networks.items():
        load_weights(network, loop.weights[name], what=f"the shared {name}")
    optimizer = OptimizerConfig(lr=config.inner_lr, betas=training.generator.betas)
    state = State({name: make_engine(name, network, optimizer, EngineConfig(kind="torch"), World(), batch=config.inner_batch)
                   for name, network in networks.items()}, {})
    plan = Plan(until=config.inner_steps * config.inner_batch, batch=config.inner_batch, seed=task.seed,
                latent_dim=training.generator.latent_dim,
                lr=dict.fromkeys(FAMILIES[training.family].names, config.inner_lr),
                weights=training.weights(warm=True), ema_halflife_images=0.0,
                precision=training.precision)
    metrics: dict[str, float] = {}
    feed = batches(source, batch=config.inner_batch, seed=task.seed, streams=1, subset=support)
    phases = FAMILIES[training.family].phases(training.on_one_process(), NO_AUGMENTATION)
    train(state, phases, feed, plan, report=lambda _, found: metrics.update(found))
    return TaskResult({name: {k: v.detach().cpu().clone() for k, v in network.state_dict().items()}
                       for name, network in networks.items()}, metrics)


def outer_step(shared: Weights, adapted: list[Weights], outer_lr: float) -> Weights:
    """phi <- phi + outer_lr * mean_i(phi_i - phi) (Nichol et al. 2018, equation 1, over a batch of tasks)."""
    return {name: {key: value + outer_lr * (torch.stack([task[name][key] for task in adapted]).mean(0) - value)
                   for key, value in named.items()} for name, named in shared.items()}


def meta_id(recipe: TrainingRecipe, start_sha256: str, source: ShardSet) -> str:
    """Identifies the meta-training; more ``meta.steps`` continue the same one."""
    fields = result_fields(recipe.meta)
    fields.pop("steps")
    training = result_fields(recipe.training)
    training.pop("images")
    return f"reptile-{content_id(recipe.seed, fields, training, start_sha256, source.manifest.sha256)}"


def draw_tasks(recipe: TrainingRecipe, source: ShardSet, step: int) -> list[Task]:
    """The tasks of outer step ``step``: classes drawn without repetition within the step."""
    config = recipe.meta
    classes = len(source.manifest.classes)
    if classes < 2:
        raise UserError(f"the source set {source.path} has {classes} classes, and meta-training takes its tasks from them; "
                        f"pack it with one subfolder per class, or leave the methods that start from meta-learned weights out.")
    order = torch.randperm(classes, generator=generator(recipe.seed, "meta tasks", step))
    seeds = torch.randint(0, 2**31, (config.tasks,), generator=generator(recipe.seed, "meta support", step))
    return [Task(str(source.path), int(order[i % classes]), int(seeds[i])) for i in range(config.tasks)]


def metatrain(recipe: TrainingRecipe, source: ShardSet, run: Path, start: Path, start_sha256: str, *,
              map_tasks: MapTasks = run_tasks_here, progress: Progress | None = None) -> Path:
    """Meta-train from the checkpoint ``start`` on, resuming in ``run/meta/<id>``; returns the last checkpoint.

    Time is counted in images: one outer step sees tasks x inner_steps x inner_batch of them.
    """
    check_generates(recipe.training, "this recipe is")
    config = recipe.meta
    identity = meta_id(recipe, start_sha256, source)
    folder = run / "meta" / identity
    per_step = config.tasks * config.inner_steps * config.inner_batch
    names = FAMILIES[recipe.training.family].names
    newest = latest_valid(folder)
    if newest:
        tensors, saved = load_checkpoint(newest, names)
        shared, step = tensors, saved["images"] // per_step
    else:
        tensors, _ = load_checkpoint(start, tuple(best_stem(name) for name in names))
        shared, step = {name: tensors[best_stem(name)] for name in names}, 0
    if step >= config.steps and newest:
        return newest
    cut_events(folder / "events.jsonl", step * per_step)
    clock, done_before = time.monotonic(), step
    with open_run(recipe.wandb, folder=run, group=recipe.name, job_type="meta", run_id=identity, name="reptile",
                  settings=recipe.model_dump(mode="json")) as log:
        while step < config.steps:
            results = list(map_tasks(adapt_to_task, InnerLoop(recipe, shared), draw_tasks(recipe, source, step)))
            shared = outer_step(shared, [result.weights for result in results],
                                value_at(config.outer_lr, step * per_step))
            step += 1
            images = step * per_step
            if step % config.report_every_steps == 0 or step == config.steps:
                metrics = {name: sum(result.metrics[name] for result in results) / len(results)
                           for name in results[0].metrics}
                metrics["images_per_second"] = (step - done_before) * per_step / (time.monotonic() - clock)
                append_event(folder / "events.jsonl", stage="meta", trial=identity, images=images, metrics=metrics)
                log.log(metrics, images)
                if progress:
                    progress(step, config.steps, metrics)
            if step % config.snapshot_every_steps == 0 or step == config.steps:
                _snapshot(recipe, source, folder, shared, images, identity)
    return step_folder(folder, config.steps * per_step)


def _snapshot(recipe: TrainingRecipe, source: ShardSet, folder: Path, shared: Weights, images: int, identity: str) -> None:
    if not all(bool(torch.isfinite(value).all()) for named in shared.values() for value in named.values()):
        raise NonFinite(f"the meta-learned weights are not finite after {images} images; lower meta.inner_lr.")
    tensors: Mapping[str, Mapping[str, Tensor]] = {**shared, "generator_ema": shared["generator"]}
    state: dict[str, Any] = {"images": images, "recipe": recipe.model_dump(mode="json"), "wandb_run_id": identity,
                             "image_shape": list(source.manifest.image_shape),
                             "classes": list(source.manifest.classes) if recipe.training.generator.classes else [],
                             "rng": {"scheme": "sha256(seed/purpose/step)", "seed": recipe.seed}}
    save_checkpoint(step_folder(folder, images), tensors, state)
    prune(folder, recipe.training.keep_checkpoints)
    network = make_networks(recipe.training, source.manifest.image_shape, 0)["generator"]
    load_weights(network, shared["generator"], what="the shared generator")
    save_grid(generate(network, latents(recipe.seed, "samples", 0, 32, recipe.training.generator.latent_dim)),
              folder / "samples.png")
