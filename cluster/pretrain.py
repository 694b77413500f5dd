"""Pretraining as a Ray Train run. The run's folder is the only truth: Ray's own storage is scratch and never resumed from."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.errors import JobFailed
from cluster.meanwhile import scored_meanwhile
from cluster.progress import console, progress
from cluster.recipe import Recipe
from data_shards import ShardSet
from training.checkpoint import latest_valid
from training.cost import cost_line
from training.events import read_events
from training.health import Unhealthy, act, make_watch, story
from training.pretrain import finished_pretraining
from training.source import set_place
from training.stopping import Stopped, sigterm_asks

POLL_S = 1.0


def worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs; each attempt resumes from the run's newest good checkpoint."""
    from data_shards import open_set
    from training.pretrain import pretrain
    from training.world import current_world

    logging.getLogger("graft").setLevel(logging.WARNING)
    with suppress(Stopped, Unhealthy):  # the driver knows, and Ray would try again
        pretrain(Recipe.model_validate(config["recipe"]), open_set(config["source"]), Path(config["run"]), current_world())


def pretrain_on_ray(recipe: Recipe, source: ShardSet, run: Path) -> Path:
    """Pretrain on ``recipe.cluster.workers`` workers of the joined Ray; returns the last checkpoint.

    Raises:
        Stopped: when SIGTERM asked for it; the workers have written a checkpoint.
        Unhealthy: when an alarm ended it (``training.health.action``).
        JobFailed: with the worker's own error, after the recipe's retries.
    """
    import ray.train
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import FailureConfig  # what ray.train gives at run time; its stubs name the old one

    storage = Path(tempfile.mkdtemp(prefix="graft-train-"))
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # Ray's 2 s are waited out when the workers are done
    # A worker has another working directory.
    root = recipe.data.root if "://" in recipe.data.root else str(Path(recipe.data.root).resolve())
    sent = recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": root})})
    config = {"recipe": sent.model_dump(mode="json"), "source": set_place(sent.data, sent.data.source), "run": str(run)}
    trainer = TorchTrainer(
        worker, train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=recipe.cluster.workers, use_gpu=recipe.cluster.gpus_per_worker > 0,
                                     resources_per_worker=recipe.cluster.worker_resources),
        run_config=RunConfig(
            name=f"{recipe.name}-{uuid.uuid4().hex[:8]}", storage_path=str(storage),
            failure_config=FailureConfig(max_failures=recipe.cluster.max_failures, controller_failure_limit=3)))
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(run / "pretrain" / "events.jsonl", recipe, stop))
    watcher.start()
    folder = run / "pretrain"
    try:
        with sigterm_asks(folder) as asked, scored_meanwhile(recipe, run):
            trainer.fit()
            newest = latest_valid(folder)
            if asked() and newest and finished_pretraining(recipe, source, folder) is None:
                raise Stopped(int(newest.name.removeprefix("step-")))
    except SystemExit as leaving:  # Ray Train's answer to Ctrl-C, which would end the program without a word
        raise KeyboardInterrupt from leaving
    except ray.train.WorkerGroupError as error:
        failures = list(error.worker_failures.values())
        raise JobFailed(f"pretraining stopped: {_last_line(failures[0]) if failures else error}") from error
    finally:
        stop.set()
        watcher.join()
        with suppress(OSError):
            shutil.rmtree(storage)
    checkpoint = finished_pretraining(recipe, source, run / "pretrain")
    log = read_events(folder / "events.jsonl")
    if checkpoint is None:
        act(make_watch(recipe.training.health, log))
    assert checkpoint, "Ray Train returned before all images were seen"
    console.print(f"pretrain  {cost_line(log, recipe.training.batch)}", markup=False)
    return checkpoint


def _watch(events: Path, recipe: Recipe, stop: threading.Event) -> None:
    """Show the metrics log as rank 0 writes it, and the news of its health."""
    lines, total = read_events(events), recipe.training.images
    shown, told = len(lines), len(story(lines, recipe.training.health))
    with progress("pretrain", total, "images") as show:
        while True:
            last = stop.wait(POLL_S)
            lines = read_events(events)
            for event in lines[min(shown, len(lines)):]:
                metrics = event["metrics"]
                if "health/rollbacks" in metrics:
                    show(event["images"], f"rolled back to here; learning rates times {metrics['lr_scale']:g}")
                    continue
                rate = metrics["images_per_second"]
                show(event["images"], f"{rate:.0f} images/s  D {metrics['discriminator/adversarial']:.3f}  "
                                      f"G {metrics['generator/adversarial']:.3f}  "
                                      f"{max(total - event['images'], 0) / rate / 60:.1f} min left")
            heard = story(lines, recipe.training.health)
            for images, sentence in heard[min(told, len(heard)):]:
                show(images, f"warning: {sentence}")
            shown, told = len(lines), len(heard)
            if last:
                return


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
