"""The whole recipe: `training`'s sections and those of the packages above it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from data_shards.errors import UserError
from training.config import Config, apply_overrides, build, operational
from training.families import FAMILIES
from training.objectives.packing import check_packing
from training.recipe import AdaptationConfig, TrainingRecipe, check_groups, per_worker_batch
from tune_spaces.config import FanoutConfig
from tune_spaces.space import ends


class WorkerRange(Config):
    """As many workers as the cluster has room for."""

    min: int = operational(1, "with fewer the pretraining waits", ge=1)
    max: int = operational(4, "workers at most", ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> WorkerRange:
        if self.min > self.max:
            raise ValueError(f"min = {self.min} is over max = {self.max}; exchange them")
        return self


class ClusterConfig(Config):
    workers: Annotated[
        Annotated[int, Field(ge=1), Tag("Number")] | Annotated[WorkerRange, Tag("Range")],
        Discriminator(lambda value: "Range" if isinstance(value, dict | WorkerRange) else "Number"),
    ] = operational(
        2, "Ray Train workers of the pretraining, which must divide the batch and the streams; {min: 1, max: 4} takes as many "
           "as the cluster has room for, and follows nodes that join and leave")
    cpus_per_worker: float = operational(1.0, "CPUs that each worker reserves", gt=0)
    gpus_per_worker: float = operational(0.0, "GPUs that each worker reserves", ge=0)
    cpus_per_trial: float = operational(1.0, "CPUs that each trial and each meta-training task reserves", gt=0)
    gpus_per_trial: float = operational(0.0, "GPUs likewise; 0.25 lets four share one", ge=0)
    max_failures: int = operational(3, "times the pretraining starts again after losing a worker", ge=0)
    hang_seconds: float = operational(
        300.0, "seconds without a step after which a worker is taken for hung, is killed, and training starts again; longer "
               "than a checkpoint takes to write", gt=0)
    start_seconds: float = operational(
        300.0, "seconds to wait for the workers' resources, and for a worker's first step (hang_seconds, if longer)", gt=0)

    @property
    def worker_bounds(self) -> tuple[int, int]:
        """The fewest and the most workers."""
        return (self.workers, self.workers) if isinstance(self.workers, int) else (self.workers.min, self.workers.max)

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
        low, high = self.cluster.worker_bounds
        if not self.world_sizes:
            if low == high:
                self._share(low)
            raise UserError(f"none of {low}-{high} workers (cluster.workers) divides both training.batch = "
                            f"{self.training.batch} and data.streams = {self.data.streams}; widen the range.")
        return self

    @model_validator(mode="after")
    def _targets_have_a_generator(self) -> Any:
        if self.fanout.targets and FAMILIES[self.training.family].translates:
            raise ValueError(f"training.family = {self.training.family} translates images and makes none from noise, which the "
                             "trials on fanout.targets adapt and score; leave fanout.targets out")
        return self

    @property
    def world_sizes(self) -> list[int]:
        """The numbers of workers within `cluster.workers` that divide the global batch and the streams, ascending."""
        low, high = self.cluster.worker_bounds
        return [size for size in range(low, high + 1) if self._divides(size)]

    def _divides(self, workers: int) -> bool:
        try:
            self._share(workers)
        except UserError:
            return False
        return True

    def _share(self, workers: int) -> int:
        """The batch of each of ``workers``; raises `UserError` where it does not divide, or splits a group of images."""
        training, parts = self.training, workers * self.training.engine.accumulation
        share = per_worker_batch(training.batch, workers, self.data.streams, training.engine.accumulation)
        check_packing("training.batch", training.batch, parts, training.objective.pack)
        check_groups("training.batch", training.batch, parts, training)
        return share

    @property
    def needs_pretrained(self) -> bool:
        from training.methods import METHODS

        return any(METHODS[name].start != "scratch" for name in self.fanout.methods)

    @model_validator(mode="after")
    def _methods_fit_the_family(self) -> Any:
        from training.families import FAMILIES
        from training.methods import METHODS

        if FAMILIES[self.training.family].drawn and (self.fanout.targets or self.evaluation.during_pretraining):
            raise ValueError(f"the family {self.training.family} makes no pictures, and fan-out and scores are of pictures; "
                             "leave fanout.targets and evaluation.during_pretraining out")
        for name in self.fanout.methods if FAMILIES[self.training.family].fit else ():
            if METHODS[name].start != "scratch":
                raise ValueError(f"the method {name} begins from other weights, which the family {self.training.family} has no "
                                 "use for, since it is fitted at once; leave it out of fanout.methods")
        return self

    @model_validator(mode="after")
    def _settings_and_space_are_values(self) -> Any:
        fanout, tree = self.fanout, self.adaptation.model_dump(mode="json")
        tried = [(f"fanout.settings.{method}", values) for method, values in fanout.settings.items()]
        tried += [("fanout.space", {name: value}) for name, axis in fanout.space.items() for value in ends(axis)]
        for where, values in tried:
            build(AdaptationConfig, apply_overrides(tree, values), where=where)
        return self

    @model_validator(mode="after")
    def _meta_has_steps(self) -> Any:
        from training.methods import METHODS

        trained = self.meta.each()
        for name in self.fanout.methods:
            rule = METHODS[name].rule
            if rule and rule not in trained:
                raise ValueError(f"the method {name} begins from what the rule {rule} meta-learned, which is neither "
                                 f"meta.rule nor in meta.also; add meta.also = {{{rule}: {{inner_optimizer: sgd}}}}, with what "
                                 "else differs, or drop the method")
            if rule and not trained[rule].steps:
                raise ValueError("a method starts from meta-learned weights, but meta.steps is 0; set it or drop the method")
        return self
