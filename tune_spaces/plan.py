"""The fan-out as a pure plan: which trials there are, and which may run given what has been reported."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from training.methods import METHODS
from training.recipe import TrainingRecipe
from training.source import set_place
from training.trial import Trial, trial_id
from tune_spaces.config import Domain, FanoutConfig
from tune_spaces.halving import SCHEDULERS, Ladder, winner
from tune_spaces.space import candidates, fair_count


@dataclass(frozen=True)
class Start:
    """Weights that methods begin from: "pretrain" or "meta:<trial>"; "scratch" has no checkpoint."""

    name: str
    checkpoint: str | None
    sha256: str | None


class Named(NamedTuple):
    """A trial with its id, computed once."""

    trial: Trial
    identity: str


@dataclass(frozen=True)
class Job:
    """One call of `run_trial`: a trial, trained up to ``until`` images."""

    trial: Trial
    identity: str
    until: int
    rung: int  # -1 for a final trial


@dataclass(frozen=True)
class Race:
    """The search of one method in one domain, and the seeds on which its winner is judged."""

    domain: str
    method: str
    scheduler: str
    ladder: Ladder
    budgets: tuple[int, ...]  # images at the end of each rung
    search: tuple[Named, ...]  # by candidate
    finals: tuple[tuple[Named, ...], ...]  # by candidate, then seed


Rows = Mapping[str, Mapping[str, Any]]
"""Trial id -> the row that the trial wrote."""


def races(recipe: TrainingRecipe, fanout: FanoutConfig, starts: Mapping[str, Start]) -> list[Race]:
    """One race per domain and method, ``starts`` by `Method.weights`. Seeds, support sets and latents are the same for every
    method of a domain."""
    found = []
    for domain in fanout.domains():
        path = set_place(recipe.data, domain.set)
        for method in fanout.methods:
            make = functools.partial(_named, recipe, domain, path, method, starts.get(METHODS[method].weights))
            own = {f"adaptation.{name}": value for name, value in fanout.settings.get(method, {}).items()}
            drawn = [{**own, **values} for values in searched(fanout, method, recipe.seed)]
            ladder = ladder_of(fanout, len(drawn))
            budgets = tuple(ladder.budget(rung, recipe.adaptation.images, recipe.adaptation.batch)
                            for rung in range(ladder.rungs))
            found.append(Race(
                domain.name, method, fanout.scheduler, ladder, budgets,
                search=tuple(make(recipe.seed, "search", values) for values in drawn),
                finals=tuple(tuple(make(recipe.seed + 1 + i, "final", values) for i in range(fanout.seeds))
                             for values in drawn)))
    return found


def searched(fanout: FanoutConfig, method: str, seed: int) -> list[dict[str, Any]]:
    """A method's candidates; as many as every other method's that searches."""
    return candidates(fanout.space, method, fair_count(fanout.space, fanout.methods, fanout.candidates), seed)


def ladder_of(fanout: FanoutConfig, count: int) -> Ladder:
    """The rungs of ``count`` candidates, no more than can be told apart."""
    return Ladder(count, min(fanout.rungs, 1 + int(math.log(count, fanout.reduction) + 1e-9)), fanout.reduction)


def _named(recipe: TrainingRecipe, domain: Domain, path: str, method: str, start: Start | None, seed: int,
           phase: Literal["search", "final"], values: Mapping[str, Any]) -> Named:
    begin = start or Start("scratch", None, None)
    trial = Trial(domain.name, path, method, seed, phase, begin.name, begin.checkpoint, begin.sha256, dict(values),
                  domain.corruption, domain.target)
    return Named(trial, trial_id(trial, recipe))


def search_reports(race: Race, rows: Rows) -> dict[tuple[int, int], float]:
    """(candidate, rung) -> selection KID, replayed from the rows; a failed candidate scores infinity where it stopped."""
    reports = {}
    for candidate, (_, identity) in enumerate(race.search):
        row = rows.get(identity)
        for rung, budget in enumerate(race.budgets):
            if row and str(budget) in row["rungs"]:
                reports[candidate, rung] = float(row["rungs"][str(budget)])
            elif row and row["status"] == "failed":
                reports[candidate, rung] = math.inf
                break
    return reports


def ready_jobs(race: Race, rows: Rows) -> list[Job]:
    """The jobs of a race that may run now: the open rung's, or the finals' once the search has a winner."""
    open_rungs = SCHEDULERS[race.scheduler](race.ladder, search_reports(race, rows))
    if open_rungs:
        return [Job(*race.search[candidate], race.budgets[rung], rung) for candidate, rung in open_rungs]
    return [Job(trial, identity, race.budgets[-1], -1) for trial, identity in final_trials(race, rows)
            if rows.get(identity, {}).get("status") not in ("finished", "failed")]


def chosen(race: Race, rows: Rows) -> int | None:
    """The candidate that won the closed search; None while it is open or when all candidates failed."""
    reports = search_reports(race, rows)
    return None if SCHEDULERS[race.scheduler](race.ladder, reports) else winner(race.ladder, reports)


def final_trials(race: Race, rows: Rows) -> tuple[Named, ...]:
    """The winner's trials over the seeds; none before there is a winner."""
    best = chosen(race, rows)
    return () if best is None else race.finals[best]


def count_jobs(race: Race) -> int:
    """Jobs of a race when no candidate fails: each rung's members, and the seeds."""
    return _jobs(race.ladder, len(race.finals[0]))


def count_all_jobs(fanout: FanoutConfig, seed: int) -> int:
    """Those of all races together."""
    return len(list(fanout.domains())) * sum(_jobs(ladder_of(fanout, len(searched(fanout, method, seed))), fanout.seeds)
                                             for method in fanout.methods)


def _jobs(ladder: Ladder, finals: int) -> int:
    return sum(ladder.size(rung) for rung in range(ladder.rungs)) + finals
