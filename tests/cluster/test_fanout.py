"""The fan-out's board without Ray: decisions, failures, and which results may stand in one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.fanout import Board
from cluster.leaderboard import build_leaderboard, contract_of, over_domains
from cluster.recipe import Recipe
from cluster.report import leaderboard_text
from cluster.run import failures
from data_shards import UserError, load_images, open_set
from data_shards.files import write_json
from tests.toy import toy_set, toy_tree
from training.events import append_event, read_events
from training.metrics.encoder import save_encoder, train_encoder
from training.trial import Trial, empty_row, run_trial, trial_folder
from tune_spaces.plan import Job, Start, races


@pytest.fixture
def board(tmp_path: Path) -> Board:
    toy_set(tmp_path / "near", train=24, reference=24)
    recipe = Recipe.model_validate(toy_tree(tmp_path) | {"fanout": {
        "targets": [{"set": "near"}], "methods": ["scratch", "finetune"], "space": {"lr": [1e-4, 1e-3]}, "candidates": 2,
        "seeds": 3}})
    starts = {"pretrain": Start("pretrain", str(tmp_path / "step"), "0" * 64)}
    return Board(recipe, tmp_path / "run", races(recipe, recipe.fanout, starts))


def played(board: Board, job: Job, score: float) -> dict[str, Any]:
    """A row as `run_trial` would have written it."""
    folder = trial_folder(board.run, job.trial, job.identity)
    row = board.rows.get(job.identity) or empty_row(job.trial, job.identity, board.recipe.adaptation)
    row |= {"images_seen": job.until, "selection_kid": score, "rungs": {**row["rungs"], str(job.until): score}}
    if job.trial.phase == "final":
        row |= {"status": "finished", "kid": score, "coverage": 0.5, "copy_rate": 0.0, "kid_ci95": [score, score],
                "contract": {"net": "encoder", "net_hash": "a", "n_reference": 24, "reference_hash": "b"}}
    write_json(folder / "row.json", row)
    return row


def play(board: Board, limit: int = 999) -> list[Job]:
    """Run the plan with made-up scores: the higher rate is better, fine-tuning beats scratch."""
    done: list[Job] = []
    while (job := board.next_job()) and len(done) < limit:
        base = 5.0 if job.trial.method == "scratch" else 1.0
        score = base + 1e-4 / job.trial.hyperparameters["adaptation.lr"] + 0.1 * job.trial.seed**2
        board.report(job, played(board, job, score))
        done.append(job)
    return done


def without_time(board: Board) -> list[dict[str, Any]]:
    return [{k: v for k, v in event.items() if k != "time"} for event in read_events(board.run / "events.jsonl")]


def test_a_driver_killed_before_it_took_a_row_in_ends_the_same(board: Board, tmp_path: Path) -> None:
    """Each time, the driver dies between a trial's writing of its row and its own record of it."""
    whole = Board(board.recipe, tmp_path / "whole", board.races)
    play(whole)
    jobs = 0
    while (job := board.next_job()) is not None:
        score = (5.0 if job.trial.method == "scratch" else 1.0) + 1e-4 / job.trial.hyperparameters["adaptation.lr"]
        played(board, job, score + 0.1 * job.trial.seed**2)
        board = Board(board.recipe, board.run, board.races)
        jobs += 1
    assert jobs == whole.total()
    assert board.plan_rows() == whole.plan_rows()
    assert {row["status"] for row in board.plan_rows() if row["phase"] == "search"} == {"finished", "stopped"}
    assert without_time(board) == without_time(whole)
    again = Board(board.recipe, board.run, board.races)
    assert without_time(again) == without_time(whole), "nothing is recorded twice"


def test_a_plan_played_to_its_end(board: Board) -> None:
    jobs = play(board)
    assert len(jobs) == board.total() == board.reported() == 2 * (2 + 1 + 3)
    assert board.finished()
    finals = [job for job in jobs if job.rung == -1]
    assert {job.trial.seed for job in finals} == {1, 2, 3}
    assert all(job.trial.hyperparameters == {"adaptation.lr": 1e-3} for job in finals)
    decisions = [e["metrics"] for e in read_events(board.run / "events.jsonl") if e["metrics"].get("decision") == "winner"]
    assert {d["method"] for d in decisions} == {"scratch", "finetune"}
    leaderboard = build_leaderboard(board.recipe, board.run, board.plan_rows(), {"pretrain_seconds": 10.0})
    verdict = next(v for v in leaderboard["verdicts"] if v["method"] == "finetune")
    assert verdict["gain_over_scratch"] == pytest.approx(4.0)
    assert verdict["verdict"] == "positive"
    assert json.loads((board.run / "leaderboard.json").read_text()) == leaderboard


def test_methods_are_summed_up_over_domains_of_which_each_counts_once() -> None:
    gains: dict[str, Any] = {"finetune": [4.0, 6.0, -1.0], "copier": [9.0, 9.0, 9.0], "scratch": [None] * 3}
    states: dict[str, Any] = {"finetune": ["positive", "positive", "negative"], "copier": [None] * 3, "scratch": [None] * 3}
    verdicts = [{"domain": f"d{i}", "method": method, "gain_over_scratch": gains[method][i], "verdict": states[method][i],
                 "disqualified": 2 if method == "copier" else 0, "kid_mean": 1.0 + i, "copy_rate_mean": 0.1 * i,
                 "coverage_mean": 0.5, "intra_distance_mean": None if i else 2.0}
                for method in gains for i in range(3)]
    rows = [{"method": "finetune", "phase": phase, "status": "finished", "seconds": seconds}
            for phase, seconds in (("final", 2.0), ("final", 4.0), ("search", 100.0))]
    copier, finetune, scratch = over_domains(verdicts, rows, {"pretrain_seconds": 30.0, "meta_reptile_seconds": 9.0}, 0.95)
    assert [each["method"] for each in (copier, finetune, scratch)] == ["copier", "finetune", "scratch"]
    assert (finetune["positive"], finetune["neutral"], finetune["negative"], finetune["disqualified"]) == (2, 0, 1, 0)
    assert copier["disqualified"] == 3 and scratch["gain_mean"] is None and scratch["gain_ci95"] is None
    half = 4.302653 * (13 ** 0.5) / 3 ** 0.5  # t of 2 degrees of freedom; the gains' variance is 13
    assert finetune["gain_mean"] == pytest.approx(3.0)
    assert finetune["gain_ci95"] == pytest.approx([3 - half, 3 + half], rel=1e-5)
    assert (finetune["seconds"], finetune["shared_seconds"], copier["shared_seconds"]) == (3.0, 30.0, 0.0)
    assert finetune["copy_rate_mean"] == pytest.approx(0.1) and finetune["intra_distance_mean"] == 2.0
    text = leaderboard_text({"verdicts": verdicts, "rows": rows, "methods": [copier, finetune, scratch]}, 140)
    summed = text.split("mean gain")[1].splitlines()
    assert [line.split()[0] for line in summed[1:4]] == ["copier", "finetune", "scratch"]
    assert "+3.00 [−5.96, 11.96]" in summed[2]


@pytest.mark.parametrize("stop", [1, 3, 4, 7, 11])
def test_a_board_rebuilt_from_the_folder_goes_on_with_the_same_plan(board: Board, stop: int, tmp_path: Path) -> None:
    first = play(board, stop)
    again = Board(board.recipe, board.run, board.races)
    assert again.reported() == stop
    rest = play(again)
    assert len(first) + len(rest) == board.total()
    assert not {(j.identity, j.until) for j in first} & {(j.identity, j.until) for j in rest}


def test_a_finished_run_with_its_stage_time_in_the_log_is_read_again(board: Board) -> None:
    play(board)
    append_event(board.run / "events.jsonl", stage="fanout", images=0, metrics={"seconds": 8.3, "completed": True})
    assert Board(board.recipe, board.run, board.races).finished()


def test_a_lost_trial_is_a_failed_row_and_the_search_goes_on(board: Board) -> None:
    job = board.next_job()
    assert job is not None
    board.report(job, board.fail(job, "its process ended"))
    play(board)
    assert board.finished()
    row = board.rows[job.identity]
    assert (row["status"], row["reason"]) == ("failed", "its process ended")
    leaderboard = build_leaderboard(board.recipe, board.run, board.plan_rows(), {})
    assert row["trial"] in {r["trial"] for r in leaderboard["rows"]}, "a failed trial is shown, not hidden"


def test_unlike_contracts_are_refused() -> None:
    shared = {"net": "encoder", "n_reference": 5, "reference_hash": "r"}
    rows = [{"domain": "d", "contract": {**shared, "net_hash": letter}} for letter in "ab"]
    with pytest.raises(UserError, match="net_hash"):
        contract_of(rows)


def test_what_failed_is_said_since_the_table_does_not_show_it() -> None:
    rows = [{"domain": "sun", "method": method, "status": status, "reason": reason} for method, status, reason in (
        ("scratch", "finished", ""), ("ewc", "failed", "no discriminator"), ("ewc", "failed", "likewise"),
        ("cdc", "failed", "no images"))]
    assert failures(rows) == ["failed    sun ewc, 2 trials: no discriminator", "failed    sun cdc, 1 trial: no images"]


def test_a_method_of_its_own_family_stands_beside_those_that_have_a_start(tmp_path: Path) -> None:
    """A run's list of methods is checked against the run's family, not against that of one method."""
    toy_set(tmp_path / "source")
    toy_set(tmp_path / "near", train=24, reference=24)
    recipe = Recipe.model_validate(toy_tree(tmp_path) | {
        "evaluation": {"net": str(_toy_net(tmp_path)), "samples": 16},
        "fanout": {"targets": [{"set": "near"}], "methods": ["scratch", "finetune", "density"]}})
    trial = Trial("near", str(tmp_path / "near"), "density", 1, "final", "scratch", None, None)
    row = run_trial(trial, recipe, tmp_path / "run", until=32)
    assert (row["status"], row["images_seen"]) == ("finished", 32)


def _toy_net(root: Path) -> Path:
    images, labels = load_images(open_set(root / "source"), np.arange(32))
    path = root / "net.safetensors"
    save_encoder(train_encoder(images, labels, classes=2, seed=0, images_budget=64, threads=1), path)
    return path
