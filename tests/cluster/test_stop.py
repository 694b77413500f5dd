"""SIGTERM to the driver, as SLURM sends it before it kills: the workers write a checkpoint, and nothing is left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.cluster.test_run import PROJECT, family
from tests.toy import toy_set, toy_tree
from training.checkpoint import latest_valid
from training.events import read_events
from training.stopping import STOP_FILE

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def start_command(tmp_path: Path, command: str, recipe: dict[str, Any]) -> subprocess.Popen[bytes]:
    """``graft COMMAND`` of the recipe, into the folder ``run``, its output into the file ``log``."""
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(recipe))
    with (tmp_path / "log").open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "cluster", command, "long.yaml", "--out", "run"], cwd=tmp_path, stdout=file,
            stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(PROJECT)}, start_new_session=True)


def start_long(tmp_path: Path) -> tuple[subprocess.Popen[bytes], Path, Path]:
    """The driver of a pretraining that would go on for hours, once it has reported; the run's pretrain folder and the log."""
    toy_set(tmp_path / "source")
    tree = toy_tree(tmp_path, images=10**6, engine={"kind": "deepspeed", "zero": 2}, report_every_images=8,
                    snapshot_every_images=10**6)
    folder, log = tmp_path / "run" / "pretrain", tmp_path / "log"
    process = start_command(tmp_path, "pretrain", tree | {"cluster": {"workers": 2}})
    deadline = time.monotonic() + 200
    while len(read_events(folder / "events.jsonl")) < 5:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)
    return process, folder, log


def test_sigterm_to_the_driver_leaves_a_checkpoint_of_that_moment(tmp_path: Path) -> None:
    process, folder, log = start_long(tmp_path)
    started = family(process)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 1, log.read_text()[-3000:]
    took = time.monotonic() - asked
    newest = latest_valid(folder)
    assert newest is not None, log.read_text()[-3000:]
    images = int(newest.name.removeprefix("step-"))
    assert f"graft: stopped at {images} images, as was asked; the same command goes on from there" in log.read_text()
    assert read_events(folder / "events.jsonl")[-1]["images"] == images < 10**6
    assert not (folder / STOP_FILE).exists()
    assert took < 30, "what a scheduler grants before it kills"
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def test_an_interrupt_is_said(tmp_path: Path) -> None:
    process, _, log = start_long(tmp_path)
    started = family(process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 1, log.read_text()[-3000:]
    assert log.read_text().endswith("graft: interrupted; the same command goes on from where it was\n")
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def test_an_interrupted_fan_out_does_not_pass_for_a_finished_one(tmp_path: Path) -> None:
    """Tune returns from Ctrl-C as from its last trial; what is missing would go into the leaderboard as never asked for."""
    toy_set(tmp_path / "source")
    toy_set(tmp_path / "target", train=24, reference=24, seed=5)
    process = start_command(tmp_path, "adapt", toy_tree(tmp_path) | {"cluster": {"workers": 1}, "fanout": {
        "targets": [{"set": "target"}], "methods": ["scratch"], "candidates": 1, "rungs": 1, "seeds": 500}})
    log, deadline = tmp_path / "log", time.monotonic() + 200
    while len(list((tmp_path / "run").glob("domains/target/*/row.json"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)
    started = family(process)
    process.send_signal(signal.SIGINT)
    assert process.wait(100) == 1, log.read_text()[-3000:]
    assert log.read_text().endswith("graft: interrupted; the same command goes on from where it was\n")
    assert not (tmp_path / "run" / "leaderboard.json").exists()
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def test_what_the_workers_refuse_is_one_sentence(tmp_path: Path) -> None:
    """A metric that the run has not is known at the first report only; new starts would not find it either."""
    toy_set(tmp_path / "source")
    tree = toy_tree(tmp_path, keep_best="kidd") | {"cluster": {"workers": 2}}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(tree))
    done = subprocess.run([sys.executable, "-m", "cluster", "pretrain", "toy.yaml", "--out", "run"], cwd=tmp_path, timeout=200,
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(PROJECT)}, check=False)
    assert done.returncode == 2, done.stderr[-3000:]
    assert done.stderr.strip().splitlines()[-1].startswith("graft: training.keep_best = 'kidd' is not a metric of this run")
    assert "goes on" not in done.stderr.strip().splitlines()[-1]
