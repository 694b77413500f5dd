"""The whole job, stage by stage. What a stage left in the run's folder is not done again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from cluster.fanout import Board, fan_out
from cluster.leaderboard import build_leaderboard
from cluster.metatrain import metatrain_on_ray
from cluster.pretrain import pretrain_on_ray
from cluster.progress import console, progress, timed
from cluster.recipe import Recipe
from cluster.session import preflight, ray_session
from cluster.sets import absent, check_sets, encoder_set, missing_sets, named_sets, ready_sets
from data_shards import ShardSet, load_images, open_set
from data_shards.errors import UserError
from data_shards.files import write_json
from training.checkpoint import checkpoint_hash, latest_valid
from training.events import read_events
from training.families import FAMILIES
from training.meta import RULES
from training.meta.metatrain import check_tasks, finished_meta, meta_id
from training.meta.rule import chosen as meta_weights
from training.methods import METHODS
from training.metrics.encoder import load_encoder, save_encoder, train_encoder
from training.networks import make_networks
from training.pictures import save_grid
from training.pretrain import finished_pretraining
from training.recipe import SCHEMA_VERSION
from training.rehearsal import rehearse
from training.source import open_cached, set_place
from training.target import load_target, support_keys
from training.world import World, device, has_bf16
from tune_spaces.plan import Race, Start, count_all_jobs, count_jobs, races
from tune_spaces.space import fair_count

STAGES = ("shards", "pretrain", "encoder", "metatrain", "fanout", "report")


def run(recipe: Recipe, out: Path, *, stages: tuple[str, ...] | None = None, address: str | None = None,
        dry_run: bool = False) -> None:
    """Do ``stages`` (all when None) of the recipe in the folder ``out``; the same call again resumes.

    Raises:
        UserError: the caller's mistake, before anything is trained where it can be known.
    """
    out = out.resolve()  # Ray's workers have another working directory
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder.")
    chosen = stages or STAGES
    console.print("\n".join(derived(recipe, out)), markup=False)
    if dry_run:
        for line in absent(recipe) if "shards" in chosen else ():
            console.print(line, markup=False)
        there = check_sets(recipe, set().union(*missing_sets(recipe).values()))
        if "fanout" in chosen and there:
            rehearse_methods(recipe, there)
        return
    source = ready_sets(recipe) if "shards" in chosen else open_set(set_place(recipe.data, recipe.data.source))
    if "fanout" in chosen:
        rehearse_methods(recipe, source)
    done = finished_pretraining(recipe, source, out / "pretrain")  # refuses another recipe's before anything is written
    if "fanout" in chosen and "pretrain" not in chosen and recipe.needs_pretrained:
        _require_pretrained(recipe, out, done)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made ({error.strerror}); give another folder.") from error
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    with ExitStack() as stack:
        folders = [set_place(recipe.data, name) for name in named_sets(recipe)]
        start_ray = _once(lambda: stack.enter_context(ray_session(address, cpus=_cpus(), folder=out, shards=folders)))
        board = None
        if "pretrain" in chosen and recipe.evaluation.during_pretraining:
            train_run_encoder(recipe, source, out)  # the net of the scores that are taken meanwhile
        if "pretrain" in chosen:
            _pretrain(recipe, source, out, done, start_ray)
        if "encoder" in chosen:
            train_run_encoder(recipe, source, out)
        if "metatrain" in chosen:
            for one in meta_recipes(recipe, every=bool(stages)):
                _metatrain(one, source, out, start_ray)
        if "fanout" in chosen and recipe.fanout.targets:
            board = _fanout(recipe, source, out, start_ray)
    if "report" in chosen or board:
        _report(recipe, out, board)


def derived(recipe: Recipe, out: Path) -> Iterator[str]:
    """What follows from the recipe, each with its formula, one line each."""
    training, fanout, cluster = recipe.training, recipe.fanout, recipe.cluster
    shares = " or ".join(f"{size} x {training.batch // size}" for size in recipe.world_sizes)
    steppers = [training.engine.said(World(size=size), training.precision) for size in recipe.world_sizes]
    precision = training.precision if training.precision != "auto" else f"auto ({'bf16' if has_bf16() else 'fp32'} here)"
    yield f"run {recipe.name} -> {out}"
    yield (f"  pretrain  {training.images} images / batch {training.batch} = {-(-training.images // training.batch)} steps; "
           f"workers x images: {shares}; {' or '.join(dict.fromkeys(steppers))}; precision {precision}")
    low, high = cluster.worker_bounds
    sizes = recipe.world_sizes
    if skipped := [size for size in range(low, high + 1) if size not in sizes]:
        yield (f"  elastic   of {low}-{high} workers, {_listed(sizes)} divide{'s' if len(sizes) == 1 else ''} the batch of "
               f"{training.batch} and the {recipe.data.streams} streams; {_listed(skipped)} "
               f"{'is' if len(skipped) == 1 else 'are'} skipped")
    for one in meta_recipes(recipe):
        meta = one.meta
        task = f"{meta.inner_steps} inner steps x {meta.inner_batch}"
        if RULES[meta.rule].queries:
            task = f"({task} + {meta.queries} queries)"
        yield (f"  meta      {meta.rule}: {meta.steps} steps x {meta.tasks} tasks x {task} = "
               f"{meta.steps * meta.images_per_step} images")
    if fanout.targets:
        count = fair_count(fanout.space, fanout.methods, fanout.candidates)
        yield (f"  fan-out   {len(list(fanout.domains()))} domains x {len(fanout.methods)} methods x ({count} candidates by "
               f"{fanout.scheduler}, then {fanout.seeds} seeds) of {recipe.adaptation.images} images; "
               f"{recipe.adaptation.shots} shots; {count_all_jobs(fanout, recipe.seed)} trial jobs")
    if not FAMILIES[recipe.training.family].drawn:
        yield f"  scores    {recipe.evaluation.net}, {recipe.evaluation.samples} samples"


def rehearse_methods(recipe: Recipe, source: ShardSet) -> None:
    """Find out before anything is trained whether the methods of the fan-out can serve the recipe's networks.

    Raises:
        UserError: what the first method or rule of meta-learning that cannot would say in its trials.
    """
    if not recipe.fanout.targets:
        return
    shape = source.manifest.image_shape
    for method in recipe.fanout.methods:
        own = {f"adaptation.{name}": value for name, value in recipe.fanout.settings.get(method, {}).items()}
        rehearse(method, recipe, shape, own)
    for one in meta_recipes(recipe):
        check_tasks(one, source)
        networks = make_networks(recipe.training, shape, recipe.seed)
        RULES[one.meta.rule].refuse(recipe.training.family, networks)
        meta_weights(networks, one.meta.inner_parts)


def _pretrain(recipe: Recipe, source: ShardSet, out: Path, done: Path | None, start_ray: Callable[[], None]) -> None:
    if done:
        console.print(f"pretrain  already done: {done}")
        return
    start_ray()
    preflight({"pretraining": [recipe.cluster.worker_resources] * recipe.world_sizes[0]})
    with timed(out, "pretrain"):
        pretrain_on_ray(recipe, source, out)


def train_run_encoder(recipe: Recipe, source: ShardSet, out: Path) -> None:
    path, taught = out / "encoder.safetensors", encoder_set(recipe, source)
    if taught is None:
        return
    if path.exists():
        load_encoder(path)
        console.print(f"encoder   already done: {path}")
        return
    images, labels = load_images(taught, taught.indices())
    total = recipe.evaluation.encoder_images
    with timed(out, "encoder"), progress("encoder", total, "images") as show:
        encoder = train_encoder(images, labels, classes=len(taught.manifest.classes), seed=recipe.seed, images_budget=total,
                                device=device(), threads=recipe.evaluation.encoder_threads,
                                progress=_every(5, lambda seen, loss: show(seen, f"loss {loss:.3f}")))
    save_encoder(encoder, path)


def _metatrain(recipe: Recipe, source: ShardSet, out: Path, start_ray: Callable[[], None]) -> None:
    start = _pretrained(recipe, source, out)
    folder = out / "meta" / meta_id(recipe, checkpoint_hash(start), source)
    if done := finished_meta(folder, recipe.meta):
        console.print(f"meta      already done: {done}")
        return
    start_ray()
    preflight({"meta-training": [recipe.cluster.trial_resources]})
    with timed(out, "meta", recipe.meta.rule):
        metatrain_on_ray(recipe, source, out, start)


def meta_recipes(recipe: Recipe, *, every: bool = False) -> list[Recipe]:
    """The recipe with one meta-training of it as its ``meta`` section: one for each rule that a method of the fan-out begins
    from, or for ``every`` rule."""
    wanted = {METHODS[name].rule for name in recipe.fanout.methods}
    return [recipe.model_copy(update={"meta": meta}) for rule, meta in recipe.meta.each().items() if every or rule in wanted]


def _fanout(recipe: Recipe, source: ShardSet, out: Path, start_ray: Callable[[], None]) -> Board:
    plan = plan_races(recipe, source, out)
    for domain in recipe.fanout.domains():
        folder, path = out / "domains" / domain.name, set_place(recipe.data, domain.set)
        images = load_target(path, recipe.adaptation.shots, recipe.seed + 1,  # the first final seed's, whose samples are shown
                             domain.corruption, set_place(recipe.data, recipe.data.source))
        seeds = range(recipe.seed, recipe.seed + recipe.fanout.seeds + 1)  # of the search, and of the finals
        shards = open_cached(path)
        write_json(folder / "support.json", {
            "schema_version": SCHEMA_VERSION, "set": domain.set, "sha256": shards.manifest.sha256,
            "shots": recipe.adaptation.shots, "seeds": support_keys(shards, recipe.adaptation.shots, seeds)})
        save_grid(images.support, folder / "support.png")
        save_grid(images.reference[:32], folder / "reference.png")
    board = Board(recipe, out, plan)
    if board.finished():
        console.print(f"fan-out   already done: {board.reported()} of {sum(map(count_jobs, plan))} results are in {out}")
        return board
    start_ray()
    preflight({"trial": [recipe.cluster.trial_resources]})
    with timed(out, "fanout"):
        return fan_out(recipe, out, plan)


def plan_races(recipe: Recipe, source: ShardSet, out: Path) -> list[Race]:
    """The fan-out's plan from the weights in the run's folder."""
    kinds = {METHODS[name].start for name in recipe.fanout.methods}
    starts = {}
    if kinds & {"pretrain", "meta"}:
        pretrained = _pretrained(recipe, source, out)
        starts["pretrain"] = Start("pretrain", str(pretrained), checkpoint_hash(pretrained))
        for one in meta_recipes(recipe):
            identity = meta_id(one, checkpoint_hash(pretrained), source)
            meta = latest_valid(out / "meta" / identity)
            if meta is None:
                raise UserError(f"{out} has no weights that {one.meta.rule} meta-learned by this recipe; run `graft metatrain` "
                                "first.")
            starts[one.meta.rule] = Start(f"meta:{identity}", str(meta), checkpoint_hash(meta))
    return races(recipe, recipe.fanout, starts)


def _pretrained(recipe: Recipe, source: ShardSet, out: Path) -> Path:
    return _require_pretrained(recipe, out, finished_pretraining(recipe, source, out / "pretrain"))


def _require_pretrained(recipe: Recipe, out: Path, checkpoint: Path | None) -> Path:
    if checkpoint is None:
        raise UserError(f"{out} has no finished pretraining of {recipe.training.images} images; run `graft pretrain` first.")
    return checkpoint


def _report(recipe: Recipe, out: Path, board: Board | None) -> None:
    from cluster.report import build_report, leaderboard_text
    from training.wandb_log import open_run

    if board:
        leaderboard = build_leaderboard(recipe, out, board.plan_rows(), stage_seconds(out))
        console.print(leaderboard_text(leaderboard, console.width if console.is_terminal else 120))
        for sentence in failures(leaderboard["rows"]):
            console.print(sentence, markup=False)
        columns = ["domain", "method", "kid_mean", "gain_over_scratch", "verdict", "copy_rate_mean", "disqualified", "seeds"]
        with open_run(recipe.wandb, folder=out, group=recipe.name, job_type="report", run_id=f"report-{out.name}",
                      name="leaderboard", settings=recipe.model_dump(mode="json")) as log:
            log.log_table("leaderboard", columns, [[v[c] for c in columns] for v in leaderboard["verdicts"]])
    console.print(f"page      {build_report(out)}")


def failures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each domain and method with trials that failed, and why the first one did: they have no row in the table."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] == "failed":
            found.setdefault((row["domain"], row["method"]), []).append(row["reason"])
    return [f"failed    {domain} {method}, {len(reasons)} trial{'s' * (len(reasons) > 1)}: {reasons[0]}"
            for (domain, method), reasons in found.items()]


def stage_seconds(out: Path) -> dict[str, float]:
    """Seconds spent in each stage over all calls, ``{"pretrain_seconds": ...}``, and in its parts, which are among them:
    ``meta_reptile_seconds``."""
    spent: dict[str, float] = {}
    for event in read_events(out / "events.jsonl"):
        if "seconds" in event["metrics"]:
            keys = [event["stage"], *([f"{event['stage']}_{event['trial']}"] if event["trial"] else [])]
            for key in keys:
                spent[f"{key}_seconds"] = round(spent.get(f"{key}_seconds", 0.0) + event["metrics"]["seconds"], 1)
    return spent


def _once(start: Callable[[], Any]) -> Callable[[], None]:
    """Start Ray on the first call only: a run that has nothing to train starts none."""
    started: list[bool] = []

    def once() -> None:
        if not started:
            start()
            started.append(True)

    return once


def _cpus() -> int:
    """CPUs of this machine that this process may use."""
    return len(os.sched_getaffinity(0))


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _every(count: int, call: Callable[..., None]) -> Callable[..., None]:
    """Pass on every ``count``-th call."""
    calls = iter(range(10**9))
    return lambda *arguments: call(*arguments) if next(calls) % count == 0 else None
