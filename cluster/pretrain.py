"""Pretraining as a Ray Train run. The run's folder is the only truth: Ray's own storage is scratch and never resumed from.

What a worker loses (docs/FAULTS.md): Ray Train starts the group again, at a size that the nodes allow, and each rank goes on
from the newest good checkpoint. The driver watches, says what happened, and kills a worker that hangs.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.elastic import CHECK_EVERY_S, CHECKPOINT_S, PLACE_S, make_trainer
from cluster.errors import JobFailed
from cluster.heartbeat import Heartbeats, answers, beating
from cluster.meanwhile import scored_meanwhile
from cluster.progress import Show, console, progress
from cluster.recipe import Recipe
from cluster.session import listens
from data_shards import ShardSet
from data_shards.errors import UserError
from training.checkpoint import latest_valid
from training.cost import cost_line
from training.events import append_event, read_events
from training.families import FAMILIES
from training.health import Unhealthy, act, make_watch, story
from training.pretrain import finished_pretraining
from training.source import rooted, set_place
from training.stopping import RESIZE_FILE, STOP_FILE, Stopped, sigterm_asks
from training.world import lost_peer

POLL_S = 1.0
LOST = ("pretraining stopped: the head of the Ray cluster is lost; once one is up, the same command goes on from the last "
        "checkpoint")
RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"  # Ray's own name, in its own case


def worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs; each attempt resumes from the run's newest good checkpoint."""
    import ray

    from data_shards import open_set
    from training.pretrain import pretrain
    from training.world import current_world

    logging.getLogger("graft").setLevel(logging.WARNING)
    recipe, run, world = Recipe.model_validate(config["recipe"]), Path(config["run"]), current_world()
    if ray.get(config["heartbeats"].refused.remote()):
        return  # a new start would be refused as well; the driver says why
    try:
        with beating(config["heartbeats"], world.rank, world.size) as step:
            pretrain(recipe, open_set(config["source"]), run, world, step=step)
    except Unhealthy:
        return  # the driver knows, and Ray would try again
    except UserError as error:
        ray.get(config["heartbeats"].refuse.remote(str(error)))
        raise  # so that ranks which still wait for this one end too
    except Stopped:
        folder = run / "pretrain"
        if (folder / STOP_FILE).exists():
            return  # likewise
        if world.rank == 0:
            (folder / RESIZE_FILE).unlink(missing_ok=True)  # the checkpoint is there: the group may be replaced
        time.sleep(CHECKPOINT_S)
        raise


def pretrain_on_ray(recipe: Recipe, source: ShardSet, run: Path) -> Path:
    """Pretrain on ``recipe.cluster.workers`` workers of the joined Ray; returns the last checkpoint.

    Raises:
        Stopped: when SIGTERM asked for it; the workers have written a checkpoint.
        Unhealthy: when an alarm ended it (``training.health.action``).
        UserError: when the workers refused the recipe.
        JobFailed: with the worker's own error, after the recipe's retries; when the workers found no place; when the
            cluster's head was lost.
    """
    import ray
    import ray.train
    from ray.train import RunConfig
    from ray.train.v2.api.config import FailureConfig, ScalingConfig  # what ray.train gives; its stubs name the old ones
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    storage = Path(tempfile.mkdtemp(prefix="graft-train-"))
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # Ray's 2 s are waited out when the workers are done
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(PLACE_S))
    sent, cluster, sizes, folder = rooted(recipe), recipe.cluster, recipe.world_sizes, run / "pretrain"
    # On the driver's own node, which another node's loss does not touch.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    heartbeats: Any = ray.remote(Heartbeats).options(num_cpus=0, scheduling_strategy=here).remote()
    config = {"recipe": sent.model_dump(mode="json"), "source": set_place(sent.data, sent.data.source), "run": str(run),
              "heartbeats": heartbeats}
    trainer = make_trainer(
        worker, sizes=sizes, folder=folder, start_seconds=cluster.start_seconds, train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=(sizes[0], sizes[-1]), use_gpu=cluster.gpus_per_worker > 0,
                                     resources_per_worker=cluster.worker_resources,
                                     elastic_resize_monitor_interval_s=CHECK_EVERY_S),
        run_config=RunConfig(
            name=f"{recipe.name}-{uuid.uuid4().hex[:8]}", storage_path=str(storage),
            failure_config=FailureConfig(max_failures=cluster.max_failures, controller_failure_limit=-1)))
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(recipe, run, heartbeats, stop))
    watcher.start()
    lost = None
    try:
        with sigterm_asks(folder) as asked, scored_meanwhile(recipe, run):
            trainer.fit()
            if refused := ray.get(heartbeats.refused.remote()):
                raise UserError(refused)
            newest = latest_valid(folder)
            if asked() and newest and finished_pretraining(recipe, source, folder) is None:
                raise Stopped(int(newest.name.removeprefix("step-")))
    except SystemExit as leaving:  # Ray Train's answer to Ctrl-C, which would end the program without a word
        raise KeyboardInterrupt from leaving
    except ray.train.WorkerGroupError as error:
        raise JobFailed(f"pretraining stopped after {cluster.max_failures} new starts (cluster.max_failures): "
                        f"{_cause(error.worker_failures)}; the same command goes on from the last checkpoint") from error
    except ray.train.ControllerError as error:
        raise JobFailed(f"pretraining stopped: {_last_line(error.controller_failure)}; "
                        "the same command goes on from the last checkpoint") from error
    except ray.exceptions.RayError as error:
        lost = error
        raise JobFailed(LOST) from error
    finally:
        stop.set()
        watcher.join()
        if lost is None:
            ray.kill(heartbeats)
        with suppress(OSError):
            shutil.rmtree(storage)
    checkpoint = finished_pretraining(recipe, source, folder)
    log = read_events(folder / "events.jsonl")
    if checkpoint is None:
        act(make_watch(recipe.training.health, log))
    assert checkpoint, "Ray Train returned before all images were seen"
    console.print(f"pretrain  {cost_line(log, recipe.training.batch)}", markup=False)
    return checkpoint


def _watch(recipe: Recipe, run: Path, heartbeats: Any, stop: threading.Event) -> None:
    """Show the metrics log as rank 0 writes it, say each new group, kill workers that hang, and notice a head that is gone."""
    import ray

    head = ray.get_runtime_context().gcs_address
    patience = float(os.environ.get(RECONNECT, "60")) - 10
    with progress("pretrain", recipe.training.images, "images") as show:
        shown, group, answered = _shower(run / "pretrain" / "events.jsonl", recipe, show), "", time.monotonic()
        while True:
            last = stop.wait(POLL_S)
            shown()
            if last:
                return
            if listens(head):
                answered = time.monotonic()
            elif time.monotonic() - answered > patience:
                break
            with suppress(Exception):  # a head that does not answer
                group = _tend(recipe, run, heartbeats, group)
    # A head with its state in Redis would have come back by now. Without one Ray ends this process, without a word of graft's
    # and with no chance to tidy up, some seconds from now; the workers on other nodes are ended by Ray likewise.
    print(f"graft: {LOST}", file=sys.stderr, flush=True)
    os._exit(1)


def _tend(recipe: Recipe, run: Path, heartbeats: Any, before: str) -> str:
    """One look at the workers; returns the newest group's name, ``before`` is the last one's."""
    import ray

    limits = (recipe.cluster.hang_seconds, recipe.cluster.start_seconds)
    (group, size, joined), hung = ray.get([heartbeats.now.remote(), heartbeats.hung.remote(*limits)], timeout=10)
    for one in hung:
        if answers(one.actor) is None:
            continue  # dead, not hung
        newest = latest_valid(run / "pretrain")
        console.print(f"pretrain  rank {one.rank} ({one.where}) {one.why}; it is killed, and training starts again from "
                      f"{newest.name if newest else 'the beginning'}", markup=False)
        append_event(run / "events.jsonl", stage="pretrain", images=0, metrics={"hung_rank": one.rank})
        ray.kill(one.actor)
        ray.get(heartbeats.leave.remote(group, one.rank), timeout=10)
    if group == before or joined < size:
        return before
    if before:
        newest = latest_valid(run / "pretrain")
        console.print(f"pretrain  goes on with {size} worker{'s' * (size > 1)} from "
                      f"{newest.name if newest else 'the beginning'}", markup=False)
    append_event(run / "events.jsonl", stage="pretrain", images=0, metrics={"workers": size})
    return str(group)


def _shower(events: Path, recipe: Recipe, show: Show) -> Callable[[], None]:
    """A function that shows the lines that are new since its last call, and the news of the run's health."""
    lines, total, family = read_events(events), recipe.training.images, FAMILIES[recipe.training.family]
    shown, told = len(lines), len(story(lines, recipe.training.health))

    def new() -> None:
        nonlocal shown, told
        lines = read_events(events)
        for event in lines[min(shown, len(lines)):]:
            metrics = event["metrics"]
            if "health/rollbacks" in metrics:
                show(event["images"], f"rolled back to here; learning rates times {metrics['lr_scale']:g}")
                continue
            rate = metrics["images_per_second"]
            show(event["images"], f"{rate:.0f} images/s  {family.line(metrics)}  "
                                  f"{max(total - event['images'], 0) / rate / 60:.1f} min left")
        heard = story(lines, recipe.training.health)
        for images, sentence in heard[min(told, len(heard)):]:
            show(images, f"warning: {sentence}")
        shown, told = len(lines), len(heard)

    return new


def _cause(failures: Mapping[int, Exception]) -> str:
    """What most likely came first, of the errors by rank: a lost process breaks the others' collectives."""
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    lost = sorted(rank for rank, error in failures.items() if isinstance(error, WorkerHealthCheckFailedError))
    if lost:
        return f"rank {', '.join(map(str, lost))} was lost (the process or its node died)"
    own = [error for error in failures.values() if not lost_peer(error)]
    return _last_line((own or list(failures.values()))[0]).rstrip(".")


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
