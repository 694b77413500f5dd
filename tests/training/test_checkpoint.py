"""Checkpoints: whole or not there, no pickle, damage is passed over aloud."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data_shards import UserError
from tests.toy import toy_set, toy_tree
from training.checkpoint import (
    checkpoint_hash,
    checkpoint_problem,
    latest_valid,
    load_checkpoint,
    prune,
    save_checkpoint,
    step_folder,
)
from training.events import append_event, cut_events, read_events

WEIGHTS = {"generator": {"w": torch.arange(6.0).reshape(2, 3)}, "generator_ema": {"w": torch.ones(2)}}


def save(parent: Path, images: int) -> Path:
    save_checkpoint(step_folder(parent, images), WEIGHTS, {"images": images})
    return step_folder(parent, images)


def little_room() -> None:
    """The kernel refuses files over 20 kB, as it does when a disk is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_from_the_checkpoint_before(tmp_path: Path) -> None:
    toy_set(tmp_path / "source")
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(yaml.safe_dump(toy_tree(tmp_path, images=64, generator={"channels": 16, "latent_dim": 4})))
    command = [sys.executable, "-m", "training", str(recipe), "--out", str(tmp_path / "run")]
    project = Path(__file__).resolve().parents[2]
    options: dict[str, Any] = {"cwd": project, "env": {**os.environ, "PYTHONPATH": str(project)}, "capture_output": True,
                               "text": True, "check": False}
    first = subprocess.run([*command, "--set", "training.images=32"], **options)
    assert (first.returncode, first.stderr) == (0, "")
    full = subprocess.run(command, preexec_fn=little_room, **options)
    assert full.returncode == 1
    assert re.fullmatch(r"INFO goes on from 32 images\n"
                        r"the checkpoint \S+step-000000000064 cannot be written \(.*File too large.*\); mend that, .*, "
                        r"and the same command goes on from the checkpoint before it\.\n", full.stderr)
    assert [path.name for path in (tmp_path / "run" / "pretrain").iterdir() if path.is_dir()] == ["step-000000000032"]
    mended = subprocess.run(command, **options)
    assert (mended.returncode, mended.stderr) == (0, "INFO goes on from 32 images\n")
    assert latest_valid(tmp_path / "run" / "pretrain") == step_folder(tmp_path / "run" / "pretrain", 64)


def test_what_is_written_is_read_and_holds_no_pickle(tmp_path: Path) -> None:
    folder = save(tmp_path, 64)
    tensors, state = load_checkpoint(folder)
    assert torch.equal(tensors["generator"]["w"], WEIGHTS["generator"]["w"])
    assert state["images"] == 64
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    assert set(state["files"]) == {"generator.safetensors", "generator_ema.safetensors"}


def test_the_same_weights_have_the_same_hash(tmp_path: Path) -> None:
    assert checkpoint_hash(save(tmp_path / "a", 1)) == checkpoint_hash(save(tmp_path / "b", 2))


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "no state", "empty state"])
def test_a_damaged_checkpoint_is_passed_over_aloud(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = save(tmp_path, 64), save(tmp_path, 128)
    victim = bad / "generator.safetensors"
    if damage == "flip":
        data = bytearray(victim.read_bytes())
        data[-3] ^= 1
        victim.write_bytes(data)
    elif damage == "truncate":
        victim.write_bytes(victim.read_bytes()[:-4])
    elif damage == "missing":
        victim.unlink()
    elif damage == "no state":
        (bad / "state.json").unlink()
    else:
        (bad / "state.json").write_text("")
    with caplog.at_level(logging.WARNING):
        assert latest_valid(tmp_path) == good
    assert "step-000000000128" in caplog.text
    with pytest.raises(UserError, match="not a usable checkpoint"):
        load_checkpoint(bad)


@pytest.mark.parametrize("call", range(7))
def test_a_writer_killed_anywhere_leaves_no_half_checkpoint(tmp_path: Path, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies at its ``call``-th fsync; what is there afterwards is the old checkpoint or the whole new one."""
    save(tmp_path, 64)
    if (pid := os.fork()) == 0:
        seen = 0
        real = os.fsync

        def deadly(descriptor: Any) -> None:
            nonlocal seen
            if seen == call:
                os._exit(9)
            seen += 1
            real(descriptor)

        setattr(os, "fsync", deadly)  # noqa: B010  # the child only
        save(tmp_path, 128)
        os._exit(0)
    os.waitpid(pid, 0)
    found = latest_valid(tmp_path)
    assert found is not None
    assert load_checkpoint(found)[1]["images"] in (64, 128)
    assert not (tmp_path / "step-000000000128").exists() or checkpoint_problem(tmp_path / "step-000000000128") is None
    prune(tmp_path, 2)
    assert not list(tmp_path.glob(".*"))


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 64)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"format_version": 99}))
    assert "upgrade graft" in str(checkpoint_problem(folder))


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for images in (1, 2, 3, 4):
        save(tmp_path, images)
    prune(tmp_path, 2)
    assert sorted(int(path.name[5:]) for path in tmp_path.iterdir()) == [3, 4]
    shutil.rmtree(tmp_path)
    assert latest_valid(tmp_path) is None


def test_the_log_survives_a_writer_killed_in_a_line(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    append_event(log, stage="pretrain", images=16, metrics={"a": 1.0})
    with log.open("a") as file:
        file.write('{"time": 1, "ima')
    append_event(log, stage="pretrain", images=32, metrics={"a": 2.0})
    assert [event["images"] for event in read_events(log)] == [16, 32]
    cut_events(log, 16)
    assert [event["images"] for event in read_events(log)] == [16]
