"""The recipe's `fanout` section."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from training.config import Config, field_paths, operational
from training.corruption import Corruption
from training.methods import METHODS
from training.recipe import AdaptationConfig, check_address
from tune_spaces.space import Axis, check_axis


class TargetConfig(Config):
    set: str = Field(description="target set: a folder below data.root, or a path")
    name: str = Field("", description="the domain's name in tables and folders; the last part of `set` when empty")

    _address = field_validator("set")(check_address)

    @property
    def domain(self) -> str:
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.name or self.set.rstrip("/").rpartition("/")[2]).strip("-.") or "domain"


class CorruptionAxis(Config):
    kind: Literal["noise", "occlusion", "mislabelled"] = Field(
        description="what is done to images of the support pool: noise, occlusion, or mislabelled: images of the source among "
                    "them")
    shares: tuple[float, ...] = Field(
        (0.0, 0.1, 0.2, 0.4), min_length=1, description="shares of the pool; each makes a domain of every target, with a "
                                                        "control of its own; 0 is the target as it is")

    @field_validator("shares")
    @classmethod
    def _shares(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(shares)) < len(shares) or not all(0 <= share <= 1 for share in shares):
            raise ValueError("shares must lie between 0 and 1 and differ")
        return shares


class Domain(NamedTuple):
    """What a race is run on."""

    name: str
    target: str  # its name without the corruption
    set: str
    corruption: Corruption | None


class FanoutConfig(Config):
    targets: tuple[TargetConfig, ...] = Field((), description="target domains")
    corruption: CorruptionAxis | None = Field(None, description="spoil a share of each target's support pool, to see what the "
                                                                "methods make of it")
    methods: tuple[str, ...] = Field(("scratch", "finetune"), description="methods compared; scratch is always among them")
    space: dict[str, Axis] = Field(
        default_factory=dict,
        description="searched fields of `adaptation`: a list of values, {uniform: [a, b]} or {loguniform: [a, b]}; a method "
                    "varies only those that it reads")
    settings: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="a method's own values for fields of `adaptation` that it can search, such as {reptile: {lr: 1e-3}}")
    candidates: int = Field(4, ge=1, description="search trials of each method in each domain, the control's included")
    rungs: int = Field(2, ge=1, description="rungs of successive halving; the last one is the whole budget")
    reduction: int = Field(2, ge=2, description="of each rung, one in so many goes on; budgets grow by the same factor")
    scheduler: Literal["halving", "asha"] = Field(
        "halving", description="halving closes a rung when all have reported, so that a killed run ends as any other; asha "
                               "promotes at once")
    seeds: int = Field(5, ge=2, description="seeds on which the chosen candidate of each method is run again and judged")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="confidence of the intervals and, Holm-corrected, the verdicts")
    max_failures: int = operational(2, "times a trial that lost its process is started again", ge=0)

    @field_validator("methods")
    @classmethod
    def _known(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        for name in methods:
            if name not in METHODS:
                raise ValueError(f"there is no method {name!r}; known: {', '.join(METHODS)}")
            if methods.count(name) > 1:
                raise ValueError(f"the method {name} is named twice; name each once")
        return methods if "scratch" in methods else ("scratch", *methods)

    @field_validator("space")
    @classmethod
    def _searchable(cls, space: dict[str, Any]) -> dict[str, Any]:
        readable = sorted({name for method in METHODS.values() for name in method.hyperparameters})
        for name, axis in space.items():
            if name not in field_paths(AdaptationConfig) or name not in readable:
                raise ValueError(f"no method searches {name!r}; searchable: {', '.join(readable)}")
            check_axis(name, axis)
        return space

    @field_validator("settings")
    @classmethod
    def _readable(cls, settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for method, values in settings.items():
            if method not in METHODS:
                raise ValueError(f"there is no method {method!r}; known: {', '.join(METHODS)}")
            for name in values:
                if name not in METHODS[method].hyperparameters:
                    known = ", ".join(METHODS[method].hyperparameters)
                    raise ValueError(f"the method {method} reads no {name!r}; it reads {known or 'none'}")
        return settings

    @model_validator(mode="after")
    def _consistent(self) -> FanoutConfig:
        domains = [domain.name for domain in self.domains()]
        for domain in domains:
            if domains.count(domain) > 1:
                raise ValueError(f"two targets are called {domain!r}; give one of them another name")
        for method, values in self.settings.items():
            for name in values:
                if name in self.space:
                    raise ValueError(f"settings give the method {method} {name} = {values[name]!r}, and the space searches "
                                     f"{name}; take it out of one of them")
        if self.candidates < self.reduction ** (self.rungs - 1):
            raise ValueError(f"{self.candidates} candidates are too few for {self.rungs} rungs that keep one in "
                             f"{self.reduction}; use at least {self.reduction ** (self.rungs - 1)}")
        return self

    def domains(self) -> Iterator[Domain]:
        """The targets, each once for every share of corruption."""
        shares = self.corruption.shares if self.corruption else (0.0,)
        for target in self.targets:
            for share in shares:
                if self.corruption and share:
                    corruption = Corruption(kind=self.corruption.kind, share=share)
                    yield Domain(f"{target.domain}-{corruption.kind}-{100 * share:g}", target.domain, target.set, corruption)
                else:
                    yield Domain(target.domain, target.domain, target.set, None)
