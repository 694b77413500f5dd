"""Checkpoints and logs in an object store: there when `state.json` is; a store that refuses is waited for, and then said."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_shards import UserError
from data_shards.stores import objects, open_store, retries
from tests.data_shards.servers import RefusingProxy
from tests.ranks import run_ranks
from tests.toy import toy_recipe, toy_set
from training import folders
from training.checkpoint import (
    NotWritten,
    checkpoint_problem,
    latest_valid,
    load_checkpoint,
    prune,
    save_checkpoint,
    step_folder,
    steps,
)
from training.events import append_event, cut_events, read_events
from training.folders import run_folder
from training.pretrain import finished_pretraining, pretrain
from training.world import World

WEIGHTS = {"generator": {"w": torch.arange(6.0).reshape(2, 3)}, "generator_ema": {"w": torch.ones(2)}}


def use_clock(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    """Waits between tries move this clock on and take no time."""
    monkeypatch.setattr(retries, "time", SimpleNamespace(
        monotonic=lambda: clock[0], sleep=lambda seconds: clock.__setitem__(0, clock[0] + seconds)))


def save(parent: str, images: int) -> str:
    save_checkpoint(step_folder(parent, images), WEIGHTS, {"images": images})
    return step_folder(parent, images)


def test_what_is_written_to_a_store_is_read(s3: str) -> None:
    folder = save(f"{s3}/run/pretrain", 64)
    tensors, state = load_checkpoint(folder)
    assert torch.equal(tensors["generator"]["w"], WEIGHTS["generator"]["w"]) and state["images"] == 64
    assert latest_valid(f"{s3}/run/pretrain") == folder and steps(f"{s3}/run/pretrain") == ["step-000000000064"]
    assert load_checkpoint(folder, ("generator_ema",))[0].keys() == {"generator_ema"}
    with pytest.raises(UserError, match="not a usable checkpoint"):
        load_checkpoint(step_folder(f"{s3}/run/pretrain", 1))


@pytest.mark.parametrize("damage", ["flip", "missing", "no state", "half a state"])
def test_a_damaged_checkpoint_in_a_store_is_passed_over_aloud(s3: str, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = save(f"{s3}/run", 64), save(f"{s3}/run", 128)
    store = open_store(bad)
    if damage == "flip":
        data = bytearray(store.read("generator.safetensors"))
        data[-3] ^= 1
        store.write("generator.safetensors", bytes(data))
    elif damage == "missing":
        store.remove("generator.safetensors")
    elif damage == "no state":
        store.remove("state.json")
    else:
        store.write("state.json", store.read("state.json")[:40])
    with caplog.at_level(logging.WARNING):
        assert latest_valid(f"{s3}/run") == good
    assert "step-000000000128" in caplog.text
    with pytest.raises(UserError, match="not a usable checkpoint"):
        load_checkpoint(bad)


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("written", range(4))
def test_a_writer_killed_between_the_objects_leaves_the_checkpoint_before(
        s3: str, written: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies after ``written`` objects; the checkpoint is there only after the last, state.json."""
    good = save(f"{s3}/run", 64)
    if (pid := os.fork()) == 0:
        count = 0
        real = objects.ObjectStore._write

        def deadly(store: objects.ObjectStore, name: str, data: bytes) -> None:
            nonlocal count
            if count == written:
                os._exit(9)
            real(store, name, data)
            count += 1

        setattr(objects.ObjectStore, "_write", deadly)  # noqa: B010  # the child only
        save(f"{s3}/run", 128)
        os._exit(0)
    os.waitpid(pid, 0)
    newer = step_folder(f"{s3}/run", 128)
    assert latest_valid(f"{s3}/run") == (newer if written == 3 else good)
    assert save(f"{s3}/run", 128) == latest_valid(f"{s3}/run"), "the same place is written again"


def test_prune_in_a_store_keeps_the_newest(s3: str) -> None:
    for images in (1, 2, 3, 4):
        save(f"{s3}/run", images)
    prune(f"{s3}/run", 2, also="step-000000000001")
    assert steps(f"{s3}/run") == [f"step-{images:012d}" for images in (1, 3, 4)]
    assert all(checkpoint_problem(f"{s3}/run/{name}") is None for name in steps(f"{s3}/run"))


def test_the_log_is_numbered_parts_that_are_cut_and_read_in_order(s3: str) -> None:
    log = f"{s3}/run/pretrain/events.jsonl"
    assert read_events(log) == []
    for images in (16, 9, 1024, 16):
        append_event(log, stage="pretrain", images=images, metrics={"a": float(images)})
    assert [event["images"] for event in read_events(log)] == [9, 16, 16, 1024]
    names = open_store(f"{s3}/run/pretrain").names()
    assert names == ["events/000000000009-0.jsonl", "events/000000000016-0.jsonl", "events/000000000016-1.jsonl",
                     "events/000000001024-0.jsonl"]
    cut_events(log, 16)
    assert [event["images"] for event in read_events(log)] == [9, 16, 16]


def test_a_store_that_refuses_for_a_minute_is_ridden_out(
        refusing_s3: tuple[str, RefusingProxy], monkeypatch: pytest.MonkeyPatch) -> None:
    """The minute is of a clock that the waits move on, so that the test does not take one."""
    bucket, proxy = refusing_s3
    clock = [1000.0]
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 1.0)
    use_clock(monkeypatch, clock)
    began = clock[0]
    proxy.refuses = lambda method, path: method == "PUT" and clock[0] - began < 60
    folder = save(f"{bucket}/run", 64)
    assert proxy.refused > 6 and latest_valid(f"{bucket}/run") == folder
    assert 60 <= clock[0] - began < 90


def test_a_store_that_refuses_for_good_is_one_sentence_and_the_run_goes_on_from_the_checkpoint_before(
        refusing_s3: tuple[str, RefusingProxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses in the middle of the second checkpoint: the first objects of it are there, and its state.json is not."""
    bucket, proxy = refusing_s3
    monkeypatch.setattr(folders, "PATIENCE_S", 0.2)
    source, run = toy_set(tmp_path / "source"), f"{bucket}/run"
    proxy.refuses = lambda method, path: method == "PUT" and "step-000000000064" in path and "optimizer" in path
    began = time.monotonic()
    with pytest.raises(NotWritten) as caught:
        pretrain(toy_recipe(tmp_path), source, run, World())
    assert time.monotonic() - began < 60
    text = str(caught.value)
    assert text.startswith(f"the checkpoint {run}/pretrain/step-000000000064 cannot be written (") and "HTTP 503" in text
    assert "goes on from the checkpoint before it" in text and "\n" not in text and "canary" not in text
    assert latest_valid(f"{run}/pretrain") == step_folder(f"{run}/pretrain", 32)
    proxy.refuses = lambda method, path: False
    last = pretrain(toy_recipe(tmp_path), source, run, World())
    assert finished_pretraining(toy_recipe(tmp_path), source, f"{run}/pretrain") == last
    whole = pretrain(toy_recipe(tmp_path), source, tmp_path / "whole", World())
    for stem, named in load_checkpoint(whole)[0].items():
        found = load_checkpoint(last, (stem,))[0][stem]
        assert all(torch.equal(named[name], found[name]) for name in named), stem
    timed = ("images_per_second", "data_wait", "cost/")
    logs = [[{"images": event["images"], **{k: v for k, v in event["metrics"].items() if not k.startswith(timed)}}
             for event in read_events(log)]
            for log in (f"{run}/pretrain/events.jsonl", tmp_path / "whole" / "pretrain" / "events.jsonl")]
    assert logs[0] == logs[1]
    assert open_store(f"{run}/pretrain").exists("samples.png")


def two_ranks_in_a_store(world: World, root: str, run: str) -> list[str]:
    from data_shards import open_set

    last = pretrain(toy_recipe(Path(root), images=32), open_set(Path(root) / "source"), run, world)
    return sorted(load_checkpoint(last)[0])


def test_two_ranks_write_one_checkpoint_into_a_store(s3: str, tmp_path: Path) -> None:
    toy_set(tmp_path / "source")
    found = run_ranks(two_ranks_in_a_store, 2, str(tmp_path), f"{s3}/run")
    assert found[0] == found[1] == ["discriminator", "discriminator_optimizer", "generator", "generator_ema",
                                    "generator_optimizer"]
    state = json.loads(open_store(f"{s3}/run/pretrain/step-000000000032").read("state.json"))
    assert state["world_size"] == 2


def test_a_store_that_cannot_be_asked_is_no_reason_to_begin_anew(
        refusing_s3: tuple[str, RefusingProxy], monkeypatch: pytest.MonkeyPatch) -> None:
    bucket, proxy = refusing_s3
    monkeypatch.setattr(folders, "PATIENCE_S", 0.0)
    save(f"{bucket}/run", 64)
    proxy.refuses = lambda method, path: True
    with pytest.raises(UserError, match=r"cannot be listed in 6 tries \(HTTP 503.*\)"):
        latest_valid(f"{bucket}/run")


def test_which_addresses_may_be_a_run(tmp_path: Path) -> None:
    assert run_folder(str(tmp_path / "a" / ".." / "b")) == tmp_path / "b"
    assert run_folder(f"file://{tmp_path}/a") == tmp_path / "a"
    assert run_folder("s3://bucket/run/") == "s3://bucket/run"
    for text in ("https://example.com/run", "pipe://rm", "s3://bucket/../x"):
        with pytest.raises(UserError, match=";"):
            run_folder(text)


def test_patience_outlasts_the_usual_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    use_clock(monkeypatch, clock)

    def refuse() -> Any:
        raise ConnectionError

    with pytest.raises(UserError, match=r"x in \d+ tries"):
        retries.retried(refuse, "x", "y", 150.0)
    assert 150 <= clock[0] < 150 + 2 * 16
