"""SIGTERM ends in a checkpoint of that moment, on all ranks at once, and the same command goes on from it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
import yaml

import training.pretrain
from data_shards import open_set
from tests.ranks import run_ranks
from tests.toy import toy_recipe, toy_set, toy_tree
from training.__main__ import main
from training.checkpoint import latest_valid, load_checkpoint
from training.events import read_events
from training.pretrain import pretrain
from training.stopping import CHECK_EVERY_STEPS, STOP_FILE, StopAsked, Stopped, sigterm_asks, stop_requests
from training.world import World

ROOT = Path(__file__).resolve().parents[2]
BATCH = 8


def test_sigterm_ends_in_a_checkpoint_and_the_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    source = toy_set(tmp_path / "source")
    often = {"report_every_images": BATCH, "snapshot_every_images": 10**6}
    recipe, run = tmp_path / "toy.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(toy_tree(tmp_path, images=64_000, **often)))
    command = [sys.executable, "-m", "training", str(recipe), "--out", str(run)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=environment)
    events = run / "pretrain" / "events.jsonl"
    deadline = time.monotonic() + 120
    while len(read_events(events)) < 10:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    newest = latest_valid(run / "pretrain")
    assert newest is not None
    images = int(newest.name.removeprefix("step-"))
    assert f"stopped at {images} images, as was asked; the same command goes on from there" in text
    assert 10 * BATCH <= images < 64_000
    assert read_events(events)[-1]["images"] == images, "no step after the checkpoint, so none is wasted"
    total = images + 5 * BATCH
    assert main([str(recipe), "--set", f"training.images={total}", "--out", str(run)]) == 0
    whole = pretrain(toy_recipe(tmp_path, images=total, **often), source, tmp_path / "whole", World())
    expected, found = (load_checkpoint(folder)[0] for folder in (whole, latest_valid(run / "pretrain") or tmp_path))
    for stem, tensors in expected.items():
        assert all(torch.equal(tensors[name], found[stem][name]) for name in tensors), stem


@contextmanager
def asked_at_once(_folder: Path) -> Iterator[StopAsked]:
    yield lambda: True



def test_a_rank_lost_under_torchrun_is_one_sentence(tmp_path: Path) -> None:
    toy_set(tmp_path / "source")
    recipe, run = tmp_path / "toy.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(toy_tree(tmp_path, images=10**6, report_every_images=BATCH, snapshot_every_images=10**6)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "training",
               str(recipe), "--out", str(run)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 120
    while len(read_events(run / "pretrain" / "events.jsonl")) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    ranks = [one for one in psutil.Process(process.pid).children() if "training" in one.cmdline()]
    assert len(ranks) == 2
    ranks[1].kill()
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert f"another rank was lost; the same command goes on from the last checkpoint in {run / 'pretrain'}" in text
    assert "gloo" not in text


def stopped_ranks(world: World, root: str) -> int:
    """Where each rank stopped when only rank 1 was asked, -1 where it did not."""
    if world.rank == 1:
        vars(training.pretrain)["stop_requests"] = asked_at_once
    try:
        pretrain(toy_recipe(Path(root), images=640), open_set(Path(root) / "source"), Path(root) / "run", world)
    except Stopped as stopped:
        return stopped.images
    return -1


def test_all_ranks_stop_at_the_same_step_when_one_is_asked(tmp_path: Path) -> None:
    toy_set(tmp_path / "source")
    images = run_ranks(stopped_ranks, 2, str(tmp_path))
    assert images[0] == images[1] and 0 <= images[0] <= CHECK_EVERY_STEPS * BATCH


def test_a_file_asks_too_and_is_removed_by_who_made_it(tmp_path: Path) -> None:
    with stop_requests(tmp_path) as asked:
        assert not asked()
        (tmp_path / STOP_FILE).touch()
        assert asked()
    before = signal.getsignal(signal.SIGTERM)
    with sigterm_asks(tmp_path) as asked:
        assert not (tmp_path / STOP_FILE).exists(), "one that a killed driver left is not an order"
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 5
        while not (tmp_path / STOP_FILE).exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert asked()
    assert not (tmp_path / STOP_FILE).exists() and signal.getsignal(signal.SIGTERM) is before


def test_a_stop_before_the_first_step_leaves_what_was_there(tmp_path: Path) -> None:
    source = toy_set(tmp_path / "source")
    (tmp_path / "run" / "pretrain").mkdir(parents=True)
    (tmp_path / "run" / "pretrain" / STOP_FILE).touch()
    with pytest.raises(Stopped, match="stopped at 0 images"):
        pretrain(toy_recipe(tmp_path), source, tmp_path / "run", World())
    assert latest_valid(tmp_path / "run" / "pretrain") is None
