"""Scores of pretraining's checkpoints while pretraining goes on: a Ray task beside the workers, which wait for nothing.

The driver watches the folder of checkpoints, has one of them scored at a time, and writes what comes back to
`evaluation/events.jsonl` and W&B. A checkpoint that appears while another is scored waits, and gives way to a newer one.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.progress import console
from cluster.recipe import Recipe
from data_shards.errors import Failure, UserError
from training.events import append_event, read_events
from training.metrics.collapse import collapse_alarm
from training.source import set_place
from training.wandb_log import WandbRun, open_run

POLL_S = 1.0


@contextmanager
def scored_meanwhile(recipe: Recipe, run: Path) -> Iterator[None]:
    """Score checkpoints that appear in ``run/pretrain`` during the block, `evaluation.during_pretraining` images apart.

    At the block's end the scores of the newest checkpoint are waited for, unless the block failed. A score that cannot be
    had becomes a line of the log, and never an error of the training.

    Raises:
        UserError: for an unknown score, before anything is trained.
    """
    if not recipe.evaluation.during_pretraining:
        yield
        return
    from training.metrics.catalogue import check_names

    check_names(recipe.evaluation.during_scores)
    stop, give_up = threading.Event(), threading.Event()
    watcher = threading.Thread(target=_watch, args=(recipe, run, stop, give_up))
    watcher.start()
    try:
        yield
    except BaseException:
        give_up.set()
        raise
    finally:
        stop.set()
        watcher.join()


def score_checkpoint(tree: dict[str, Any], checkpoint: str, against: str, run: str) -> dict[str, Any]:
    """The Ray task: the recipe's scores of one checkpoint."""
    os.nice(10)  # its process is its own (max_calls=1)
    import torch

    from data_shards import open_set
    from training.evaluation import evaluate, of_checkpoint
    from training.target import feature_net

    recipe = Recipe.model_validate(tree)
    torch.set_num_threads(recipe.training.threads)
    fakes = of_checkpoint(Path(checkpoint), recipe.evaluation.samples, recipe.seed)
    return evaluate(fakes, open_set(against), feature_net(recipe.evaluation.net, run), scores=recipe.evaluation.during_scores,
                    seed=recipe.seed, threads=recipe.training.threads)


def _watch(recipe: Recipe, run: Path, stop: threading.Event, give_up: threading.Event) -> None:
    import ray

    # No CPU is asked for: the workers hold what the cluster has, and the task runs at low priority beside them.
    remote = ray.remote(num_cpus=0, max_calls=1, max_retries=1)(score_checkpoint)
    against = set_place(recipe.data, recipe.evaluation.against or recipe.data.source)
    log = open_run(recipe.wandb, folder=run, group=recipe.name, job_type="evaluation", run_id=f"evaluation-{run.name}",
                   name="evaluation", settings=recipe.model_dump(mode="json"))
    events, task, images = run / "evaluation" / "events.jsonl", None, 0
    kept = run / "evaluation" / "checkpoint"  # the one being scored: pretraining may prune its own copy at any time
    tried = max((event["images"] for event in read_events(events)), default=0)
    while not give_up.is_set():
        last = stop.wait(POLL_S)
        if task is not None and ray.wait([task], timeout=0)[0]:
            _record(task, images, events, log)
            task = None
            shutil.rmtree(kept)
        due = _due(run / "pretrain", tried + recipe.evaluation.during_pretraining)
        if task is None and due is not None and _keep(due, kept):
            tried = images = int(due.name.removeprefix("step-"))
            task = remote.remote(recipe.model_dump(mode="json"), str(kept), against, str(run))
        if last and task is None:
            break
    if task is not None:
        ray.cancel(task, force=True)
    shutil.rmtree(kept, ignore_errors=True)
    log.finish()


def _due(folder: Path, images: int) -> Path | None:
    """The newest checkpoint, if it has seen so many images; the task itself looks at its hashes."""
    found = [path for path in folder.glob("step-*") if (path / "state.json").exists()]
    newest = max(found, default=None)
    return newest if newest and int(newest.name.removeprefix("step-")) >= images else None


def _keep(checkpoint: Path, kept: Path) -> bool:
    """Make ``kept`` a copy of the checkpoint, by hard links where the file system has them; False if it was pruned just now."""
    shutil.rmtree(kept, ignore_errors=True)  # a killed driver's
    try:
        shutil.copytree(checkpoint, kept, copy_function=_link)
    except (shutil.Error, FileNotFoundError):
        return False
    return True


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
    return target


def _record(task: Any, images: int, events: Path, log: WandbRun) -> None:
    import ray

    try:
        found = ray.get(task)
    except (ray.exceptions.RayError, UserError, Failure) as error:
        reason = " ".join(str(getattr(error, "cause", None) or error).split())[-300:]
        append_event(events, stage="evaluation", images=images, metrics={"error": reason})
        console.print(f"evaluation of step {images} left out: {reason}", markup=False)
        return
    scores = dict(found["scores"])
    scores["collapse_alarm"] = collapse_alarm([*(event["metrics"] for event in read_events(events)), scores])
    append_event(events, stage="evaluation", images=images, metrics={**scores, "contract": found["contract"]})
    log.log({name: float(value) for name, value in scores.items() if isinstance(value, int | float)}, images)
    if scores["collapse_alarm"]:
        console.print(f"evaluation: the generator collapsed; spread {scores['spread']:.2f} and coverage "
                      f"{scores['coverage_share']:.2f} of a perfect sampler's, {scores['repeats']:.0%} twins", markup=False)
