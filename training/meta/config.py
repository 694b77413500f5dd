"""The recipe's ``meta`` section."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from training.config import Config, build, one_of, operational
from training.meta import RULES
from training.schedule import Schedule, check_schedule


class MetaConfig(Config):
    rule: str = Field("reptile", description=f"how the shared weights learn from tasks: {', '.join(RULES)}")
    steps: int = Field(0, ge=0, description="outer steps of meta-training; 0 leaves it out")
    tasks: int = Field(4, ge=1, description="tasks (source classes) per outer step")
    shots: int = Field(10, ge=1, description="support images of a task")
    queries: int = Field(10, ge=1, description="further images of a task, on which fomaml and maml take the adapted weights' "
                                               "loss; reptile reads none")
    inner_steps: int = Field(10, ge=1, description="gradient steps of G and D within a task")
    inner_batch: int = Field(16, ge=1, description="images per inner step")
    inner_lr: float = Field(2e-4, gt=0, description="learning rate of the inner loop")
    inner_optimizer: Literal["adam", "sgd"] = Field(
        "adam", description="of the inner loop: adam with the network's betas and fresh moments in each task, or plain sgd")
    inner_parts: tuple[str, ...] = Field(
        ("*",), min_length=1, description="shell patterns of the weights that the inner loop adapts, such as generator.blocks.*"
                                          " or discriminator.head.*; fomaml and maml learn the others too, reptile leaves them")
    outer_optimizer: Literal["sgd", "adam"] = Field(
        "sgd", description="what steps the shared weights by the tasks' mean gradient")
    outer_betas: tuple[float, float] = Field((0.9, 0.999), description="decay rates of the outer Adam's moments")
    outer_lr: Schedule = Field(0.5, description="learning rate of the outer optimizer; for reptile with sgd it is the share of "
                                                "the mean task update that the shared weights take")
    also: dict[str, dict[str, Any]] = Field(
        {}, description="further meta-trainings of the run, by their rule: the fields of this section that differ for it")
    report_every_steps: int = operational(5, "outer steps between two lines of the metrics log", ge=1)
    snapshot_every_steps: int = operational(50, "outer steps between two checkpoints", ge=1)

    _schedule = field_validator("outer_lr")(check_schedule)
    _known = field_validator("rule")(one_of(lambda: RULES, "rule"))

    @model_validator(mode="after")
    def _goes_together(self) -> MetaConfig:
        if self.inner_optimizer not in RULES[self.rule].inner_optimizers:
            raise ValueError(f"the rule {self.rule} differentiates through the inner steps, for which inner_optimizer must be "
                             f"{' or '.join(RULES[self.rule].inner_optimizers)}; set that, or use fomaml")
        for rule, changes in self.also.items():
            if rule == self.rule or {"rule", "also"} & changes.keys():
                raise ValueError(f"also.{rule} is to hold what differs for another rule than {self.rule}; name that rule, and "
                                 "give neither rule nor also in it")
        self.each()
        return self

    def each(self) -> dict[str, MetaConfig]:
        """The run's meta-trainings by rule, each as a section by itself.

        Raises:
            UserError: for what ``also`` has and this section cannot.
        """
        own = self.model_copy(update={"also": {}})
        tree = own.model_dump(mode="json")
        return {self.rule: own, **{rule: build(MetaConfig, {**tree, **changes, "rule": rule}, where=f"meta.also.{rule}")
                                   for rule, changes in self.also.items()}}

    @property
    def images_per_task(self) -> int:
        """Images that a task sees, repeats of its support set counted."""
        return self.inner_steps * self.inner_batch + (self.queries if RULES[self.rule].queries else 0)

    @property
    def images_per_step(self) -> int:
        """Images of an outer step."""
        return self.tasks * self.images_per_task
