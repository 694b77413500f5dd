"""Checkpoints in the background: the step does not wait, what fails is said on all ranks, the best is kept."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

import training.snapshots
from data_shards import UserError, open_set
from data_shards.errors import Failure
from tests.ranks import run_ranks
from tests.toy import toy_recipe, toy_set
from training.checkpoint import NotWritten, latest_valid, load_checkpoint, read_state, steps
from training.loop import NonFinite
from training.pretrain import pretrain
from training.snapshots import Part, Snapshots, check_metric, deal
from training.world import World


def parts(value: float = 1.0, **more: float) -> dict[str, Part]:
    def gather(held: float) -> Callable[[int], Mapping[str, Tensor]]:
        return lambda to: {"w": torch.full((4,), held)}

    return {stem: Part(4, gather(held)) for stem, held in {"generator": value, "discriminator": value, **more}.items()}


def save(snapshots: Snapshots, images: int, given: dict[str, Part], state: dict[str, Any]) -> None:
    snapshots.save(images, snapshots.gather(given, {}), state)


@settings(deadline=None)
@given(some.dictionaries(some.text(min_size=1), some.integers(0, 1000), max_size=9), some.integers(1, 5))
def test_files_are_dealt_so_that_no_rank_has_much_more_than_its_share(sizes: dict[str, int], ranks: int) -> None:
    dealt = deal(sizes, ranks)
    assert dealt.keys() == sizes.keys() and set(dealt.values()) <= set(range(ranks))
    loads = [sum(size for stem, size in sizes.items() if dealt[stem] == rank) for rank in range(ranks)]
    assert max(loads) <= sum(sizes.values()) / ranks + max(sizes.values(), default=0)
    owners = dict.fromkeys(list(sizes)[:2], ranks - 1)
    assert owners.items() <= deal(sizes, ranks, owners).items()


def test_saving_does_not_wait_for_the_disk_and_the_next_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, real = threading.Event(), vars(training.snapshots)["write_part"]

    def slow(*given: Any) -> Any:
        gate.wait(60)
        return real(*given)

    monkeypatch.setattr(training.snapshots, "write_part", slow)
    snapshots = Snapshots(tmp_path, World(), resumed=0, keep=2)
    save(snapshots, 8, parts(), {"images": 8})
    snapshots.settle()
    assert steps(tmp_path) == []
    threading.Timer(0.5, gate.set).start()
    began = time.monotonic()
    save(snapshots, 16, parts(), {"images": 16})
    assert steps(tmp_path) == ["step-000000000008"] and time.monotonic() - began > 0.3
    assert snapshots.stalled_s > 0.3
    snapshots.wait()
    snapshots.close()
    assert steps(tmp_path) == ["step-000000000008", "step-000000000016"] and not list(tmp_path.glob(".*"))


def test_a_checkpoint_holds_what_was_true_when_it_was_begun(tmp_path: Path) -> None:
    recipe, source = toy_recipe(tmp_path, images=16, snapshot_every_images=8), toy_set(tmp_path / "source")
    pretrain(recipe, source, tmp_path / "two", World())
    one = pretrain(toy_recipe(tmp_path, images=8), source, tmp_path / "one", World())
    ours, theirs = load_checkpoint(tmp_path / "two/pretrain/step-000000000008")[0], load_checkpoint(one)[0]
    assert all(torch.equal(ours[stem][name], theirs[stem][name]) for stem in theirs for name in theirs[stem])


@pytest.mark.parametrize("stem", ["discriminator", "generator_ema", "generator_optimizer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_that_is_not_finite_becomes_a_checkpoint(tmp_path: Path, stem: str, value: float) -> None:
    snapshots = Snapshots(tmp_path, World(), resumed=0, keep=2)
    save(snapshots, 8, parts(), {"images": 8})
    save(snapshots, 16, parts(**{stem: value}), {"images": 16})
    with pytest.raises(NonFinite, match=f"w of {stem} is not finite after 16 images"):
        snapshots.wait()
    assert steps(tmp_path) == ["step-000000000008"]


def test_read_only_storage_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel answers on a file system that was mounted read-only, or became it: EROFS, also for root."""
    snapshots = Snapshots(tmp_path, World(), resumed=0, keep=2)
    save(snapshots, 8, parts(), {"images": 8})
    snapshots.wait()

    def refuse(path: Path, data: bytes) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    save(snapshots, 16, parts(), {"images": 16})
    with pytest.raises(NotWritten, match=r"step-000000000016 cannot be written \(Read-only file system\); .* goes on from"):
        snapshots.wait()
    assert latest_valid(tmp_path) == tmp_path / "step-000000000008" and not list(tmp_path.glob(".*"))


def one_rank_cannot_write(world: World, root: str) -> str:
    """What each rank of two is told when only rank 1's disk is full, by the second checkpoint."""
    if world.rank == 1:
        real = vars(training.snapshots)["write_part"]

        def full(folder: Path, *given: Any) -> Any:
            if folder.name == "step-000000000064":
                raise NotWritten(f"the checkpoint {folder.name} cannot be written (No space left on device)")
            return real(folder, *given)

        vars(training.snapshots)["write_part"] = full
    try:
        pretrain(toy_recipe(Path(root), images=960), open_set(Path(root) / "source"), Path(root) / "run", world)
    except Failure as failure:
        return f"{type(failure).__name__}: {failure}"
    return "nothing"


def test_what_fails_on_one_rank_is_the_same_sentence_on_all(tmp_path: Path) -> None:
    toy_set(tmp_path / "source")
    said = run_ranks(one_rank_cannot_write, 2, str(tmp_path))
    assert said == ["NotWritten: the checkpoint step-000000000064 cannot be written (No space left on device)"] * 2
    assert latest_valid(tmp_path / "run/pretrain") == tmp_path / "run/pretrain/step-000000000032"


def shares(world: World, root: str) -> list[str]:
    written: list[str] = []
    real = vars(training.snapshots)["write_part"]

    def noting(folder: Path, tensors: Mapping[str, Any], attempt: str) -> Any:
        written.extend(tensors)
        return real(folder, tensors, attempt)

    vars(training.snapshots)["write_part"] = noting
    pretrain(toy_recipe(Path(root), images=32, engine={"kind": "deepspeed", "zero": 2}), open_set(Path(root) / "source"),
             Path(root) / "run", world)
    return written


def test_every_rank_writes_a_share_of_the_files(tmp_path: Path) -> None:
    toy_set(tmp_path / "source")
    ours, theirs = run_ranks(shares, 2, str(tmp_path))
    assert ours and theirs and not set(ours) & set(theirs)
    state = read_state(tmp_path / "run/pretrain/step-000000000032")
    assert {f"{stem}.safetensors" for stem in [*ours, *theirs]} == set(state["files"]) and len(state["files"]) == 5


def test_the_best_is_kept_beside_the_newest_and_marked(tmp_path: Path) -> None:
    values = {8: 3.0, 16: 1.0, 24: 2.0, 32: 5.0, 40: 4.0}
    for better, best in (("smallest", 16), ("largest", 32)):
        folder = tmp_path / better
        snapshots = Snapshots(folder, World(), resumed=0, keep=2, best="kid", better=better)  # type: ignore[arg-type]
        for images, value in values.items():
            save(snapshots, images, parts(), {"images": images, "metrics": {"kid": value}})
        snapshots.wait()
        kept = sorted({best, 32, 40})
        assert steps(folder) == [f"step-{images:012d}" for images in kept]
        marked = json.loads((folder / "best.json").read_text())
        assert marked == {"schema_version": 1, "metric": "kid", "better": better, "value": values[best],
                          "checkpoint": f"step-{best:012d}", "images": best}


def test_a_metric_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    source = toy_set(tmp_path / "source")
    with pytest.raises(UserError, match=r"keep_best = 'kidd' is not a metric.*discriminator/adversarial.*generator/total"):
        pretrain(toy_recipe(tmp_path, keep_best="kidd"), source, tmp_path / "run", World())
    check_metric("", {})
    pretrain(toy_recipe(tmp_path, keep_best="generator/total", report_every_images=8, snapshot_every_images=8), source,
             tmp_path / "best", World())
    marked = json.loads((tmp_path / "best/pretrain/best.json").read_text())
    assert (tmp_path / "best/pretrain" / marked["checkpoint"] / "state.json").exists()


def test_a_damaged_checkpoint_is_not_counted_among_those_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The newest is damaged; a run that goes on from the one before, with another interval, still ends with two good ones."""
    source, folder = toy_set(tmp_path / "source"), tmp_path / "run" / "pretrain"
    pretrain(toy_recipe(tmp_path, images=64), source, tmp_path / "run", World())
    victim = folder / "step-000000000064" / "generator.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        pretrain(toy_recipe(tmp_path, images=48), source, tmp_path / "run", World())
    assert "step-000000000064 is passed over: generator.safetensors does not match" in caplog.text
    assert steps(folder) == [f"step-{images:012d}" for images in (32, 48, 64)]
