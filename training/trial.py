"""One trial of the fan-out: a target domain, a method, a seed, hyper-parameters; trained, scored, written to its own folder.

Plain functions of one process: the fan-out runs them as Ray Tune trials, a notebook or a test runs them as they are.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.nn.utils import parametrize

from data_shards import Batch, batches
from data_shards.files import write_json
from training.augment import Strength, read_strength
from training.checkpoint import checkpoint_problem, load_checkpoint, save_checkpoint
from training.config import apply_overrides, content_id, result_fields
from training.corruption import Corruption
from training.draws import latents
from training.ema import make_average, whole_average
from training.engines import EngineConfig, make_engine, whole_weights
from training.events import append_event, cut_events
from training.families import FAMILIES, Phase, check_generates
from training.freezing import freeze_matching
from training.loop import NonFinite, Plan, State, train
from training.methods import METHODS, Adaptation
from training.methods.kernels import merged
from training.metrics.copying import nearest_support
from training.metrics.kid import kid
from training.metrics.likeness import Pictures
from training.metrics.score import contract, score
from training.networks import load_start, load_weights, make_networks
from training.optimizers import OptimizerConfig
from training.pictures import generate, save_grid
from training.recipe import SCHEMA_VERSION, AdaptationConfig, TrainingRecipe, resolve
from training.sample import averaged_generator
from training.source import open_cached, set_place, told_classes
from training.target import Target, feature_net, for_target, load_target, target_features
from training.wandb_log import open_run
from training.world import World

AVERAGE = "generator_average"  # the file stem of the average as it is trained, of a search trial that may go on
EVALUATIONS = 4  # points of a trial's curve, evenly spaced over its budget


@dataclass(frozen=True)
class Trial:
    """What is trained. ``set_path`` is the domain's set, ``checkpoint`` the start's (None for scratch)."""

    domain: str
    set_path: str
    method: str
    seed: int
    phase: Literal["search", "final"]
    start: str  # "scratch", "pretrain" or "meta:<trial>"
    checkpoint: str | None
    checkpoint_sha256: str | None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)  # dotted recipe keys
    corruption: Corruption | None = None  # of the support pool
    target: str = ""  # the domain's name without its corruption, where it has one


def trial_id(trial: Trial, recipe: TrainingRecipe) -> str:
    """Hash of all that determines the trial's result; the same trial has the same id in any run and on any machine."""
    fields = result_fields(recipe)
    for section in ("data", "meta", "fanout", "cluster"):  # what they decide is in the checkpoint's hash
        fields.pop(section, None)
    fields["training"].pop("images")
    fields["adaptation"] = {name: value for name, value in fields["adaptation"].items()
                            if name == trial.method or name not in METHODS}  # not the sections of other methods
    settings = {**METHODS[trial.method].derived(recipe), **trial.hyperparameters}
    spoilt = [] if trial.corruption is None else [
        trial.corruption.model_dump(mode="json"), open_cached(set_place(recipe.data, recipe.data.source)).manifest.sha256]
    fields |= METHODS[trial.method].reads(recipe)
    return content_id(fields, trial.domain, open_cached(trial.set_path).manifest.sha256, trial.method, trial.seed, trial.phase,
                      trial.start, trial.checkpoint_sha256, settings, *spoilt)


def trial_recipe(method: str, recipe: TrainingRecipe, hyperparameters: Mapping[str, Any]) -> TrainingRecipe:
    """The run's recipe with what a method comes with and what a search chose for it.

    Raises:
        UserError: for settings that do not go together, and families that make no images from noise.
    """
    # Without the sections of packages above: what they say is of the whole run, not of a method's own family.
    tree = apply_overrides(recipe.model_dump(mode="json"), {
        **METHODS[method].settings, **METHODS[method].derived(recipe), **hyperparameters})
    own = resolve(TrainingRecipe, tree, where=f"the method {method}")
    check_generates(own.training, "the trial's recipe is")
    return own


def trial_folder(run: Path, trial: Trial, identity: str) -> Path:
    return run / "domains" / trial.domain / identity


def run_trial(trial: Trial, recipe: TrainingRecipe, run: Path, *, until: int,
              progress: Callable[[int, dict[str, float]], None] | None = None) -> dict[str, Any]:
    """Train a trial from where its folder stands up to ``until`` images, score it, and write its row.

    A search trial is scored against held-back pool images; a final one also, once, against the reference images. What is
    already there is not done again. A diverged trial gets the status "failed", not an exception.

    Returns:
        The row of `leaderboard.json` (DESIGN part 5), with "selection_kid", "phase" and "hyperparameters" beside.
    """
    identity = trial_id(trial, recipe)
    recipe = for_target(trial_recipe(trial.method, recipe, trial.hyperparameters), open_cached(trial.set_path))
    config, folder = recipe.adaptation, trial_folder(run, trial, identity)
    row = read_row(folder)
    if row and (row["status"] == "failed" or (row["images_seen"] >= until and (trial.phase == "final"
                                                                               or str(until) in row["rungs"]))):
        return row
    torch.set_num_threads(recipe.training.threads)
    started = time.monotonic()
    source = set_place(recipe.data, recipe.data.source)
    target = load_target(trial.set_path, config.shots, trial.seed, trial.corruption, source)
    folder.mkdir(parents=True, exist_ok=True)
    spent_before = float(row["seconds"]) if row else 0.0
    try:
        state, phases, feed = _begin(trial, recipe, folder, target)
    except NonFinite as error:  # in what the method itself trains
        row = empty_row(trial, identity, config) | {
            "status": "failed", "reason": str(error), "seconds": round(spent_before + time.monotonic() - started, 2)}
        write_json(folder / "row.json", row)
        return row
    events = folder / "events.jsonl"
    cut_events(events, state.images)
    log = open_run(recipe.wandb, folder=run, group=recipe.name, job_type=trial.phase, run_id=identity,
                   name=f"{trial.domain}/{trial.method}/{trial.seed}", settings={
                       "domain": trial.domain, "method": trial.method, "seed": trial.seed, **trial.hyperparameters})
    features = target_features(trial.set_path, config.shots, trial.seed, recipe.evaluation.net, str(run), trial.corruption,
                               source)
    shown = make_networks(recipe.training, target.image_shape, 0)["generator"]
    z = latents(trial.seed, "evaluation", 0, recipe.evaluation.samples, recipe.training.generator.latent_dim)
    extractor = feature_net(recipe.evaluation.net, str(run))
    seen: dict[str, Any] = {}

    def look() -> None:
        """Generate from the same latents as ever, and take the selection score."""
        load_weights(shown, _plain_average(state), what="the average")
        seen["images"] = generate(shown, z)
        seen["features"] = extractor.extract(seen["images"])
        seen["selection_kid"] = kid(seen["features"], features["held_back"])

    def report(state: State, metrics: dict[str, float]) -> None:
        look()
        metrics = {**metrics, "selection_kid": seen["selection_kid"]}
        append_event(events, stage=trial.phase, trial=identity, images=state.images, metrics=metrics)
        log.log(metrics, state.images)
        if progress:
            progress(state.images, metrics)

    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    row = empty_row(trial, identity, config) | {"rungs": dict(row["rungs"]) if row else {}}
    try:
        train(state, phases, feed, _plan(trial, recipe, until), report=report)
    except NonFinite as error:
        row |= {"status": "failed", "reason": str(error)}
    else:
        if not seen:  # trained before, killed before its row was written
            look()
        row["selection_kid"] = row["rungs"][str(until)] = seen["selection_kid"]
        row["status"] = "finished" if state.images >= config.images else "running"
        if trial.phase == "final":
            row |= score(seen["features"], features["reference"], features["support"], features["held_back"],
                         seed=trial.seed, net=recipe.evaluation.net,
                         pictures=Pictures(seen["images"], target.support, target.held_back))
            row["contract"] = contract(extractor, target.reference_sha256, len(z), len(target.reference), _version())
        save_grid(seen["images"][:32], folder / "samples.png")
        _save_nearest(seen["images"][:8], seen["features"][:8], target.support, features["support"],
                      folder / "nearest.png")
        log.log_image("samples", folder / "samples.png")
        _save(trial, recipe, state, folder / "best")
        row["checkpoint"] = f"domains/{trial.domain}/{identity}/best"
    seconds = spent_before + time.monotonic() - started
    row |= {"images_seen": state.images, "seconds": round(seconds, 2),
            "gpu_hours": round(seconds / 3600, 5) if torch.cuda.is_available() else 0.0}
    write_json(folder / "row.json", row)
    log.finish()
    return row


def empty_row(trial: Trial, identity: str, config: AdaptationConfig) -> dict[str, Any]:
    """A trial's row before it has any result."""
    scores = ("kid", "kid_ci95", "fd", "fid", "precision", "recall", "density", "coverage", "intra_distance",
              "empty_clusters", "copy_rate", "auth_pct")
    return {
        "schema_version": 1,
        "domain": trial.domain, "target": trial.target or trial.domain,
        "corruption": trial.corruption.model_dump(mode="json") if trial.corruption else None,
        "method": trial.method, "start": trial.start, "seed": trial.seed, "trial": identity,
        "status": "running", "shots": config.shots, "images_budget": config.images, "images_seen": 0, "seconds": 0.0,
        "gpu_hours": 0.0, **dict.fromkeys(scores), "disqualified": False, "reason": "", "checkpoint": None,
        "phase": trial.phase, "hyperparameters": dict(trial.hyperparameters), "selection_kid": None, "rungs": {}}


def read_row(folder: Path) -> dict[str, Any] | None:
    """The row that a trial wrote, None where it has written none."""
    path = folder / "row.json"
    return json.loads(path.read_text()) if path.exists() else None


def rescore(row: Mapping[str, Any], recipe: TrainingRecipe, run: Path, *, set_path: str, net: str,
            samples: int | None = None) -> dict[str, Any]:
    """A final trial's row with its scores taken again, from its checkpoint, in another net or over another sample count."""
    corruption = Corruption.model_validate(row["corruption"]) if row.get("corruption") else None
    source = set_place(recipe.data, recipe.data.source)
    target = load_target(set_path, row["shots"], row["seed"], corruption, source)
    features = target_features(set_path, row["shots"], row["seed"], net, str(run), corruption, source)
    network, own, _ = averaged_generator(run / row["checkpoint"])
    z = latents(row["seed"], "evaluation", 0, samples or recipe.evaluation.samples, own.training.generator.latent_dim)
    extractor = feature_net(net, str(run))
    images = generate(network, z)
    scores = score(extractor.extract(images), features["reference"], features["support"], features["held_back"],
                   seed=row["seed"], net=net, pictures=Pictures(images, target.support, target.held_back))
    found = contract(extractor, target.reference_sha256, len(z), len(target.reference), _version())
    return {**row, **scores, "contract": found}


def _begin(trial: Trial, recipe: TrainingRecipe, folder: Path,
           target: Target) -> tuple[State, Sequence[Phase], Iterator[Batch]]:
    """The trial's state, at its start or where it was left, what its steps run, and the batches that they see."""
    config, method, family = recipe.adaptation, METHODS[trial.method], FAMILIES[recipe.training.family]
    networks = make_networks(recipe.training, target.image_shape, trial.seed)
    if trial.checkpoint:
        done = load_start(networks, Path(trial.checkpoint), told_classes(recipe, trial.set_path))
        write_json(folder / "start.json", {
            "schema_version": SCHEMA_VERSION, "start": trial.start, "checkpoint_sha256": trial.checkpoint_sha256,
            "networks": {name: asdict(each) for name, each in done.items()}})
    resumed = trial.phase == "search" and (folder / "best").exists() and checkpoint_problem(folder / "best") is None

    def train_on_support(state: State, phases: Sequence[Phase], until: int, **changes: Any) -> None:
        if config.frozen:
            freeze_matching(state.networks, config.frozen, adaptation.source)
        train(state, phases, _support(trial, config, target, state.images), replace(_plan(trial, recipe, until), **changes))

    adaptation = Adaptation(recipe, {name: copy.deepcopy(network).requires_grad_(False) for name, network in networks.items()},
                            target.support, trial.seed,
                            family.phases(recipe.training.on_one_process(), config.augmentation), train_on_support, resumed,
                            feed=partial(_support, trial, config, target))
    images, strength = method.prepare(networks, adaptation) or 0, Strength()
    if family.fit:
        family.fit(networks["generator"], recipe.training, target.support, trial.seed)
    if config.frozen and trial.checkpoint:
        freeze_matching(networks, config.frozen, adaptation.source)
    tensors: dict[str, dict[str, Tensor]] = {}
    if resumed:
        tensors, saved = load_checkpoint(folder / "best")
        images, strength = int(saved["images"]), read_strength(saved.get("augmentation"))
        for name, network in networks.items():
            load_weights(network, tensors[name], what=f"{folder}/best/{name}.safetensors")
    optimizers = recipe.trial_optimizers()
    # What a method adds to the family's networks is frozen: its engine only keeps it in the checkpoint.
    engines = {name: make_engine(name, network, optimizers.get(name, OptimizerConfig()), EngineConfig(kind="torch"), World(),
                                 batch=config.batch, state=tensors.get(f"{name}_optimizer"))
               for name, network in networks.items()}
    average = make_average(engines["generator"], tensors.get(AVERAGE))
    feed = method.batches(adaptation, networks, _support(trial, config, target, images))
    return State(engines, {"generator": average}, images=images, strength=strength), method.phases(adaptation), feed


def _support(trial: Trial, config: AdaptationConfig, target: Target, images: int) -> Iterator[Batch]:
    """The support set's batches after so many images."""
    shards = open_cached(trial.set_path)
    feed = batches(shards, batch=config.batch, seed=trial.seed, images_seen=images, streams=1,
                   subset=np.asarray(target.support_indices, np.int64))
    if trial.corruption is None:
        return feed
    rows = {name: row for row, name in enumerate(shards.samples["key"][list(target.support_indices)].tolist())}
    return (replace(batch, images=target.support[[rows[name] for name in batch.names.tolist()]]) for batch in feed)


def _plan(trial: Trial, recipe: TrainingRecipe, until: int) -> Plan:
    config: AdaptationConfig = recipe.adaptation
    optimizers = recipe.trial_optimizers()
    return Plan(until=until, batch=config.batch, seed=trial.seed, latent_dim=recipe.training.generator.latent_dim,
                lr={name: optimizer.lr for name, optimizer in optimizers.items()},
                every={name: optimizer.every for name, optimizer in optimizers.items()},
                weights={**recipe.training.weights(warm=True), "r1": config.r1, "r2": config.r2},
                augmentation=config.augmentation,
                ema_halflife_images=config.ema_halflife_images, precision=recipe.training.precision,
                report_every_images=max(config.images // EVALUATIONS, config.batch))


def _plain_average(state: State) -> dict[str, Tensor]:
    """The generator's average as the family's own network has it, whatever parameterisation the method trains."""
    engine = state.engines["generator"]
    average = whole_average(state.averages["generator"], engine)
    if not any(parametrize.is_parametrized(module) for module in engine.module.modules()):
        return average
    network = copy.deepcopy(engine.module)
    network.load_state_dict(average)
    return {name: value.detach().cpu() for name, value in merged(network).items()}


def _save(trial: Trial, recipe: TrainingRecipe, state: State, folder: Path) -> None:
    """A search trial keeps all it needs to go on; a final one the generator that was scored."""
    weights = {"generator_ema": _plain_average(state)}
    if trial.phase == "search":
        weights[AVERAGE] = whole_average(state.averages["generator"], state.engines["generator"])
        weights |= {name: whole_weights(engine) for name, engine in state.engines.items()}
        weights |= {f"{name}_optimizer": engine.optimizer_state() for name, engine in state.engines.items()}
    save_checkpoint(folder, weights, {"images": state.images, "recipe": recipe.model_dump(mode="json"),
                                      "image_shape": list(open_cached(trial.set_path).manifest.image_shape),
                                      "classes": list(told_classes(recipe, trial.set_path)),
                                      "augmentation": state.strength.as_json(),
                                      "rng": {"scheme": "sha256(seed/purpose/images)", "seed": trial.seed}})


def _save_nearest(fakes: Tensor, fake_features: Tensor, support: Tensor, support_features: Tensor, path: Path) -> None:
    """Generated images above, each with its nearest support image below."""
    nearest, _ = nearest_support(fake_features, support_features)
    save_grid(torch.cat([fakes, support[nearest]]), path, columns=len(fakes))


def _version() -> str:
    try:
        return version("graft-gan")
    except PackageNotFoundError:
        return "unknown"
