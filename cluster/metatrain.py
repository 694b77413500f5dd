"""Meta-training with its tasks spread over Ray actors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.progress import progress
from cluster.recipe import Recipe
from data_shards import ShardSet
from training.checkpoint import checkpoint_hash
from training.families import FAMILIES
from training.meta.metatrain import Shared, Task, TaskResult, metatrain


def metatrain_on_ray(recipe: Recipe, source: ShardSet, run: Path, start: Path) -> Path:
    """Meta-train by ``recipe.meta`` from ``start`` on; the tasks of an outer step run on one actor per trial's share of the
    cluster."""
    import ray

    available, family = ray.cluster_resources(), FAMILIES[recipe.training.family]
    needs = recipe.cluster.trial_resources
    count = max(1, min([recipe.meta.tasks, *(int(available.get(name, 0) // need) for name, need in needs.items())]))
    actor = ray.remote(num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0), max_restarts=3, max_task_retries=3)(TaskRunner)
    actors: list[Any] = [actor.remote() for _ in range(count)]

    def map_tasks(run_task: Callable[[Shared, Task], TaskResult], shared: Shared, tasks: list[Task]) -> list[TaskResult]:
        sent = ray.put(shared)
        return ray.get([actors[i % count].run.remote(run_task, sent, task) for i, task in enumerate(tasks)])

    try:
        with progress(recipe.meta.rule, recipe.meta.steps, "steps") as show:
            def report(step: int, total: int, metrics: dict[str, float]) -> None:
                rate = metrics["images_per_second"]
                left = (total - step) * recipe.meta.images_per_step / rate
                show(step, f"{rate:.0f} images/s  {family.line(metrics)}  {left / 60:.1f} min left")

            return metatrain(recipe, source, run, start, checkpoint_hash(start), map_tasks=map_tasks, progress=report)
    finally:
        for running in actors:
            ray.kill(running)


class TaskRunner:
    """An actor: keeps the process, its imports and its open shards over the tasks."""

    def run(self, run_task: Callable[[Shared, Task], TaskResult], shared: Shared, task: Task) -> Any:
        return run_task(shared, task)
