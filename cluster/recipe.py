"""The whole recipe: `training`'s sections and those of the packages above it."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from training.config import Config, operational
from training.recipe import TrainingRecipe, per_worker_batch
from tune_spaces.config import FanoutConfig


class ClusterConfig(Config):
    workers: int = operational(2, "Ray Train workers of the pretraining; they must divide the batch and the streams", ge=1)
    cpus_per_worker: float = operational(1.0, "CPUs that each worker reserves", gt=0)
    gpus_per_worker: float = operational(0.0, "GPUs that each worker reserves", ge=0)
    cpus_per_trial: float = operational(1.0, "CPUs that each trial and each meta-training task reserves", gt=0)
    gpus_per_trial: float = operational(0.0, "GPUs likewise; 0.25 lets four share one", ge=0)
    max_failures: int = operational(3, "times the pretraining starts again after losing a worker", ge=0)

    @property
    def worker_resources(self) -> dict[str, float]:
        return _resources(self.cpus_per_worker, self.gpus_per_worker)

    @property
    def trial_resources(self) -> dict[str, float]:
        return _resources(self.cpus_per_trial, self.gpus_per_trial)


def _resources(cpus: float, gpus: float) -> dict[str, float]:
    return {"CPU": cpus} | ({"GPU": gpus} if gpus else {})


class Recipe(TrainingRecipe):
    """What ``graft run`` reads."""

    fanout: FanoutConfig = FanoutConfig()
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)

    @model_validator(mode="after")
    def _workers_divide(self) -> Any:
        per_worker_batch(self.training.batch, self.cluster.workers, self.data.streams, self.training.engine.accumulation)
        return self

    @model_validator(mode="after")
    def _targets_have_the_sources_classes(self) -> Any:
        if self.training.generator.classes and self.fanout.targets:
            raise ValueError(f"training.generator.classes = {self.training.generator.classes} makes a source that is told its "
                             "classes, and target domains have others; leave fanout.targets out, or set it to 0")
        return self

    @property
    def needs_meta(self) -> bool:
        from training.methods import METHODS

        return any(METHODS[name].start == "meta" for name in self.fanout.methods)

    @property
    def needs_pretrained(self) -> bool:
        from training.methods import METHODS

        return any(METHODS[name].start != "scratch" for name in self.fanout.methods)

    @model_validator(mode="after")
    def _meta_has_steps(self) -> Any:
        if self.needs_meta and not self.meta.steps:
            raise ValueError("a method starts from meta-learned weights, but meta.steps is 0; set it or drop the method")
        return self
