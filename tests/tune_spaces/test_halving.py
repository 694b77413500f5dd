"""Successive halving replayed step by step, candidates, and the plan of a fan-out."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.toy import toy_recipe, toy_set
from training.methods import METHODS
from tune_spaces.config import FanoutConfig, TargetConfig
from tune_spaces.halving import SCHEDULERS, Ladder, asha, halving, winner
from tune_spaces.plan import count_all_jobs, count_jobs, races
from tune_spaces.space import Axis, candidates, fair_count

LADDER = Ladder(candidates=4, rungs=3, reduction=2)


def test_a_rung_closes_when_all_have_reported() -> None:
    reports = {(0, 0): 3.0, (1, 0): 1.0, (2, 0): 2.0}
    assert halving(LADDER, reports) == [(3, 0)]
    reports[3, 0] = 4.0
    assert halving(LADDER, reports) == [(1, 1), (2, 1)]
    reports |= {(1, 1): 2.5, (2, 1): 0.5}
    assert halving(LADDER, reports) == [(2, 2)]
    reports[2, 2] = 0.4
    assert halving(LADDER, reports) == []
    assert winner(LADDER, reports) == 2


def test_budgets_grow_by_the_factor_and_end_at_the_whole() -> None:
    assert [LADDER.budget(rung, 1600, 16) for rung in range(3)] == [400, 800, 1600]
    assert [Ladder(2, 2, 4).budget(rung, 100, 16) for rung in range(2)] == [32, 100]


def test_a_failed_candidate_never_climbs_and_never_wins() -> None:
    reports = {(c, 0): math.inf for c in range(3)} | {(3, 0): 9.0}
    assert halving(LADDER, reports) == [(3, 1)]
    assert winner(LADDER, {(c, 0): math.inf for c in range(4)}) is None
    assert halving(LADDER, {(c, 0): math.inf for c in range(4)}) == []


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(2, 4), st.integers(0, 10**6), st.sampled_from(sorted(SCHEDULERS)))
def test_every_search_ends_with_the_whole_budget_spent_on_its_winner(n: int, rungs: int, reduction: int, seed: int,
                                                                     scheduler: str) -> None:
    """In whatever order jobs finish: nothing runs twice, the search ends, and synchronous halving ends alike."""
    ladder = Ladder(n, rungs, reduction)
    scores: dict[tuple[int, int], float] = {}
    rng = random.Random(seed)
    table = {(c, r): random.Random(f"{seed} {c} {r}").random() for c in range(n) for r in range(rungs)}
    while ready := SCHEDULERS[scheduler](ladder, scores):
        assert not set(ready) & scores.keys()
        job = rng.choice(ready)
        scores[job] = table[job]
    best = winner(ladder, scores)
    assert best is not None
    assert (best, rungs - 1) in scores
    if scheduler == "halving":
        other: dict[tuple[int, int], float] = {}
        while ready := halving(ladder, other):
            other[ready[-1]] = table[ready[-1]]
        assert other == scores


def test_asha_promotes_before_the_rung_is_full() -> None:
    assert (1, 1) in asha(LADDER, {(0, 0): 3.0, (1, 0): 1.0})


def test_candidates_are_the_methods_own_axes_and_reproducible() -> None:
    space: dict[str, Axis] = {"lr": [1e-4, 2e-4, 4e-4], "r1": [0.1, 1.0], "frozen_blocks": [1, 2]}
    assert {frozenset(c) for c in candidates(space, "finetune", 99, 0)} == {frozenset({"adaptation.lr", "adaptation.r1"})}
    assert len(candidates(space, "finetune", 99, 0)) == 6
    assert len(candidates(space, "freezed", 99, 0)) == 12
    drawn = candidates(space, "freezed", 4, 0)
    assert drawn == candidates(space, "freezed", 4, 0) != candidates(space, "freezed", 4, 1)
    assert len({str(point) for point in drawn}) == 4
    assert candidates({"frozen_blocks": [1, 2]}, "finetune", 4, 0) == [{}]


def test_every_method_gets_the_same_number_of_search_trials() -> None:
    methods = tuple(METHODS)
    assert fair_count({"lr": [1e-4, 2e-4], "frozen_blocks": [1, 2]}, methods, 4) == 2
    assert fair_count({"lr": {"loguniform": (1e-5, 1e-3)}}, methods, 4) == 4


def test_intervals_are_drawn_within_their_bounds() -> None:
    space: dict[str, Axis] = {"lr": {"loguniform": (1e-5, 1e-3)}, "r1": [0.5, 1.0]}
    drawn = candidates(space, "finetune", 50, 0)
    rates = [point["adaptation.lr"] for point in drawn]
    assert all(1e-5 <= rate <= 1e-3 for rate in rates)
    assert 10 < sum(rate < 1e-4 for rate in rates) < 40


@pytest.mark.parametrize(("change", "sentence"), [
    ({"methods": ["finetun"]}, "there is no method 'finetun'"), ({"space": {"shots": [1]}}, "no method searches 'shots'"),
    ({"space": {"lr": []}}, "at least one and different"), ({"space": {"lr": {"loguniform": [0, 1]}}}, "positive"),
    ({"candidates": 2, "rungs": 3}, "too few for 3 rungs"), ({"settings": {"cd": {"lr": 1}}}, "there is no method 'cd'"),
    ({"settings": {"finetune": {"ewc.weight": 1}}}, "finetune reads no 'ewc.weight'; it reads lr, r1"),
    ({"methods": ["scratch", "bsa", "bsa"]}, "bsa is named twice"),
    ({"settings": {"cdc": {"lr": 1e-3}}, "space": {"lr": [1e-4]}}, "the method cdc lr = 0.001, and the space searches lr"),
    ({"targets": [{"set": "a/x"}, {"set": "b/x"}]}, "two targets are called 'x'")])
def test_a_wrong_fan_out_is_refused(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        FanoutConfig.model_validate(change)


def test_a_methods_own_settings_are_those_of_all_its_trials(tmp_path: Path) -> None:
    toy_set(tmp_path / "source")
    toy_set(tmp_path / "target", train=24, reference=24)
    fanout = FanoutConfig.model_validate({
        "targets": [{"set": "target"}], "methods": ["scratch", "structure", "density"], "space": {"r1": [1.0, 2.0]},
        "settings": {"scratch": {"lr": 3e-4}}, "candidates": 2, "rungs": 1})
    scratch, structure, _ = races(toy_recipe(tmp_path), fanout, {})
    assert [named.trial.hyperparameters for named in scratch.search] == [
        {"adaptation.lr": 3e-4, "adaptation.r1": 1.0}, {"adaptation.lr": 3e-4, "adaptation.r1": 2.0}]
    assert [named.trial.hyperparameters for named in structure.search] == [{}]
    assert all(named.trial.hyperparameters["adaptation.lr"] == 3e-4 for seeds in scratch.finals for named in seeds)


@pytest.mark.parametrize(("candidates", "rungs", "scheduler"), [(1, 1, "halving"), (4, 2, "asha"), (5, 3, "halving")])
def test_all_jobs_are_counted_before_there_are_races(tmp_path: Path, candidates: int, rungs: int, scheduler: str) -> None:
    toy_set(tmp_path / "source")
    toy_set(tmp_path / "target", train=24, reference=24)
    fanout = FanoutConfig.model_validate({
        "targets": [{"set": "target"}], "methods": ["scratch", "structure", "density"],
        "space": {"r1": [1.0, 2.0, 3.0, 4.0, 5.0]},
        "candidates": candidates, "rungs": rungs, "seeds": 3, "scheduler": scheduler,
        "corruption": {"kind": "noise", "shares": [0, 0.5]}})
    assert count_all_jobs(fanout, 0) == sum(map(count_jobs, races(toy_recipe(tmp_path), fanout, {})))


def test_scratch_is_always_among_the_methods_and_names_are_safe_folders() -> None:
    assert FanoutConfig(methods=("finetune",)).methods == ("scratch", "finetune")
    assert TargetConfig(set="quickdraw/test/the-eiffel-tower").domain == "the-eiffel-tower"
    assert TargetConfig(set="x", name="../../etc/<b>").domain == "etc-b"
