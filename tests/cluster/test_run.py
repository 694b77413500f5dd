"""The whole job on a real Ray of its own: killed twice, resumed, compared with a run that was not, then run once more."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.toy import toy_set, toy_tree
from training.checkpoint import latest_valid
from training.events import read_events

PROJECT = Path(__file__).resolve().parents[2]
METHODS = ["scratch", "finetune", "freezed", "reptile"]
TIMED = ("seconds", "gpu_hours")


def write_recipe(root: Path) -> Path:
    toy_set(root / "source")
    toy_set(root / "near", train=24, reference=24, seed=5)
    toy_set(root / "far", train=24, reference=24, seed=6)
    tree = toy_tree(root, images=256, engine={"kind": "deepspeed", "zero": 2}, report_every_images=32,
                    snapshot_every_images=64)
    tree |= {"wandb": {"mode": "offline"}, "cluster": {"workers": 2}, "fanout": {
        "targets": [{"set": "near"}, {"set": "far"}], "methods": METHODS, "space": {"lr": [1e-4, 1e-3]}, "candidates": 2,
        "rungs": 2, "seeds": 2}}
    (root / "mine.yaml").write_text(yaml.safe_dump(tree))
    return root / "mine.yaml"


def start(recipe: Path, out: Path, log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    with log.open("wb") as file:
        # A relative --out, as users type it: Ray's workers have another working directory.
        return subprocess.Popen([sys.executable, "-m", "cluster", "run", str(recipe), "--out", out.name], stdout=file,
                                cwd=out.parent, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def finish(recipe: Path, out: Path, log: Path) -> str:
    assert start(recipe, out, log).wait(600) == 0, log.read_text()[-3000:]
    return log.read_text()


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


def kill_when(process: subprocess.Popen[bytes], reached: Callable[[], bool], log: Path) -> list[psutil.Process]:
    """SIGKILL the driver once ``reached()``; returns what it had started, which must go with it (see `runs`)."""
    deadline = time.monotonic() + 600
    while not reached():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    started = family(process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return started[1:]


def rows(out: Path) -> list[dict[str, Any]]:
    board = json.loads((out / "leaderboard.json").read_text())
    kept = [{k: v for k, v in row.items() if k not in TIMED} for row in board["rows"]]
    return sorted(kept, key=lambda row: row["trial"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, Path]]:
    """(recipe, the run that was killed in pretraining and in the fan-out, the run that was not)."""
    root = tmp_path_factory.mktemp("job")
    recipe, killed, whole, log = write_recipe(root), root / "killed", root / "whole", root / "log"
    orphans = kill_when(start(recipe, killed, log), lambda: latest_valid(killed / "pretrain") is not None, log)
    orphans += kill_when(start(recipe, killed, log), lambda: len(list(killed.glob("domains/*/*/row.json"))) > 4, log)
    text = finish(recipe, killed, log)
    assert "pretrain  already done" in text
    finish(recipe, whole, log)
    _, alive = psutil.wait_procs(orphans, timeout=60)  # Ray's agents take up to a minute to notice
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    yield recipe, killed, whole


pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]


def test_a_killed_run_ends_with_the_leaderboard_of_one_that_was_not(runs: tuple[Path, Path, Path]) -> None:
    _, killed, whole = runs
    assert rows(killed) == rows(whole)
    strip = [json.loads((out / "leaderboard.json").read_text())["verdicts"] for out in (killed, whole)]
    assert strip[0] == strip[1]
    images = [event["images"] for event in read_events(killed / "pretrain" / "events.jsonl")]
    assert images == sorted(set(images)), "a resumed run cuts the log at its checkpoint"
    assert images[-1] == 256


def test_the_rows_are_what_was_asked_for(runs: tuple[Path, Path, Path]) -> None:
    _, _, whole = runs
    board = json.loads((whole / "leaderboard.json").read_text())
    finals = [row for row in board["rows"] if row["phase"] == "final"]
    for domain in ("near", "far"):
        for method in METHODS:
            ours = [row for row in finals if (row["domain"], row["method"]) == (domain, method)]
            searched = [row for row in board["rows"] if row["phase"] == "search" and row["method"] == method
                        and row["domain"] == domain]
            assert sorted(row["seed"] for row in ours) == [1, 2]
            assert sorted(row["status"] for row in searched) == ["finished", "stopped"], "as many search trials for each method"
            assert all(row["kid"] is None and row["selection_kid"] is not None for row in searched)
            winner = min((row for row in searched if row["status"] == "finished"), key=lambda row: row["selection_kid"])
            assert {str(row["hyperparameters"]) for row in ours} == {str(winner["hyperparameters"])}
            assert all((whole / row["checkpoint"] / "state.json").exists() for row in ours)
            best = min(searched, key=lambda row: row["rungs"]["16"])
            assert best["status"] == "finished", "the better half of a rung goes on"
    assert {row["start"].partition(":")[0] for row in finals if row["method"] == "reptile"} == {"meta"}
    verdicts = {(v["domain"], v["method"]): v["verdict"] for v in board["verdicts"]}
    assert len(verdicts) == 8
    assert all((verdict is None) == (method == "scratch") for (_, method), verdict in verdicts.items())
    assert board["contract"]["net"] == "encoder"
    assert set(board["contract"]["domains"]) == {"near", "far"}
    published = json.loads((whole / "domains" / "near" / "support.json").read_text())
    assert {len(keys) for keys in published["seeds"].values()} == {published["shots"]}
    assert {str(row["seed"]) for row in board["rows"]} == published["seeds"].keys()
    assert (whole / "report" / "index.html").stat().st_size > 10_000


def test_pretraining_really_had_two_workers_under_zero(runs: tuple[Path, Path, Path]) -> None:
    _, _, whole = runs
    checkpoint = latest_valid(whole / "pretrain")
    assert checkpoint is not None
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["world_size"] == 2
    engine = state["recipe"]["training"]["engine"]
    assert (engine["kind"], engine["zero"]) == ("deepspeed", 2)


def test_the_same_command_again_trains_nothing_and_says_so(runs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    recipe, killed, _ = runs
    watched = [path for path in killed.rglob("*") if path.suffix == ".safetensors" or path.name in ("row.json", "events.jsonl")]
    before = {path: path.stat().st_mtime_ns for path in watched}
    started = time.monotonic()
    text = finish(recipe, killed, tmp_path / "log")
    for stage in ("pretrain", "encoder", "meta", "fan-out"):
        assert f"{stage:<9} already done" in text
    assert before == {path: path.stat().st_mtime_ns for path in watched}
    assert time.monotonic() - started < 120


def test_wandb_has_a_run_for_each_stage_and_trial(runs: tuple[Path, Path, Path]) -> None:
    _, _, whole = runs
    names = {path.name.rpartition("-run-")[2].partition("-")[2] for path in (whole / "wandb").glob("**/offline-run-*")}
    board = json.loads((whole / "leaderboard.json").read_text())
    assert {row["trial"] for row in board["rows"]} <= names
    assert any(name.startswith("pretrain-") for name in names)
    assert any(name.startswith("reptile-") for name in names)
    assert any(name.startswith("report-") for name in names)
