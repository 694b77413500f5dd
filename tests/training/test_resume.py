"""A run that was cut off anywhere and resumed is the run that was not: bit-equal at one world size, close at another.

The cuts here are exceptions at chosen steps, so that many engines and world sizes can be tried; `test_chaos.py` kills.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import training.pretrain
from data_shards import open_set
from tests.ranks import run_ranks
from tests.toy import toy_recipe, toy_set
from training.checkpoint import load_checkpoint, read_state
from training.events import read_events
from training.pretrain import pretrain
from training.world import World

TIMED = ("images_per_second", "data_wait", "cost/")
Weights = dict[str, dict[str, Tensor]]
Order = dict[int, list[int]]  # checksums of this rank's samples, by images seen before the batch


class Cut(Exception):
    """Stands for a kill: nothing of pretraining may run after it."""


def run(recipe: Any, root: Path, name: str, world: World, order: Order, cut_at: int | None = None) -> Path | None:
    """Pretrain into ``root/name``, noting the data; None when it was cut off before the step at ``cut_at`` images."""
    patched = vars(training.pretrain)
    real = patched["batches"]

    def noting(*given: Any, **named: Any) -> Iterator[Any]:
        for number, batch in enumerate(real(*given, **named)):
            if "rank" in named:
                images = named["images_seen"] + number * named["batch"]
                if images == cut_at:
                    raise Cut
                order[images] = [zlib.crc32(image.numpy().tobytes()) for image in batch.images]
            yield batch

    patched["batches"] = noting
    try:
        return pretrain(recipe, open_set(root / "source"), root / name, world)
    except Cut:
        return None
    finally:
        patched["batches"] = real


def metrics_log(folder: Path) -> list[dict[str, Any]]:
    return [{"images": event["images"], **{k: v for k, v in event["metrics"].items() if not k.startswith(TIMED)}}
            for event in read_events(folder / "pretrain" / "events.jsonl")]


def whole_and_cut(world: World, root: str, kind: str, zero: int, precision: str) -> list[str]:
    """What differs between a run and one that was cut at four places, between reports and right after a checkpoint too."""
    folder = Path(root)
    recipe = toy_recipe(folder, engine={"kind": kind, "zero": zero, "persistence_threshold": 0}, images=96,
                        report_every_images=40, snapshot_every_images=16, precision=precision)
    whole, parts = {}, {}  # type: ignore[var-annotated]
    expected = run(recipe, folder, "whole", world, whole)
    for cut_at in (8, 32, 56, 88):
        assert run(recipe, folder, "cut", world, parts, cut_at) is None
    found = run(recipe, folder, "cut", world, parts)
    assert expected and found
    differs = ["data order"] if whole != parts else []
    ours, theirs = load_checkpoint(found)[0], load_checkpoint(expected)[0]
    for stem, named in theirs.items():
        differs += [f"{stem}: {name}" for name in named if not torch.equal(ours[stem][name], named[name])]
    if metrics_log(folder / "whole") != metrics_log(folder / "cut"):
        differs.append("metrics log")
    return differs


@pytest.mark.parametrize(("size", "kind", "zero", "precision"), [
    (1, "torch", 0, "fp32"), (1, "torch", 0, "fp16"), (1, "deepspeed", 2, "fp32"), (2, "torch", 0, "fp32"),
    (2, "deepspeed", 0, "fp32"), (2, "deepspeed", 1, "fp32"), (2, "deepspeed", 2, "bf16"), (2, "deepspeed", 2, "bf16_weights"),
    (2, "deepspeed", 3, "fp32")])
def test_a_run_that_was_cut_off_is_bit_equal_to_one_that_was_not(tmp_path: Path, size: int, kind: str, zero: int,
                                                                 precision: str) -> None:
    toy_set(tmp_path / "source")
    assert run_ranks(whole_and_cut, size, str(tmp_path), kind, zero, precision) == [[]] * size


def test_a_checkpoint_between_two_reports_holds_what_the_next_one_needs(tmp_path: Path) -> None:
    toy_set(tmp_path / "source")
    recipe = toy_recipe(tmp_path, images=16, report_every_images=24, snapshot_every_images=8)
    folder = pretrain(recipe, open_set(tmp_path / "source"), tmp_path / "run", World())
    kept = read_state(folder.with_name("step-000000000008"))["unreported"]
    assert kept["steps"] == 1 and len(kept["sums"]) == 1
    assert {each["names"][0] for each in kept["sums"][0]} == {"generator", "discriminator"}
    assert read_state(folder)["unreported"]["steps"] == 0, "the last report comes before the last checkpoint"


def one_leg(world: World, root: str, name: str, kind: str, zero: int, images: int) -> Order:
    order: Order = {}
    recipe = toy_recipe(Path(root), engine={"kind": kind, "zero": zero, "persistence_threshold": 0}, batch=12, images=images,
                        report_every_images=24, snapshot_every_images=48, keep_checkpoints=9)
    assert run(recipe, Path(root), name, world, order)
    return order


def test_another_world_size_and_stage_goes_on_with_the_same_data_and_nearly_the_same_weights(tmp_path: Path) -> None:
    """Two ranks under ZeRO 2, then one under ZeRO 0, then three under ZeRO 3, against one plain process: ten steps of Adam
    after the first change. The largest difference is at most 1e-3 of the largest movement (DESIGN part 7)."""
    toy_set(tmp_path / "source")
    legs = [(2, "deepspeed", 2, 48), (1, "deepspeed", 0, 120), (3, "deepspeed", 3, 168)]
    expected = run_ranks(one_leg, 1, str(tmp_path), "whole", "torch", 0, 168)[0]
    found: Order = {}
    for size, kind, zero, images in legs:
        ranks = run_ranks(one_leg, size, str(tmp_path), "legs", kind, zero, images)
        for before in ranks[0]:
            # Entry k of a global batch belongs to rank k mod size.
            found[before] = [ranks[k % size][before][k // size] for k in range(12)]
    assert found == expected
    begin, end = (load_checkpoint(tmp_path / "whole/pretrain" / f"step-{images:012d}")[0] for images in (48, 168))
    reached = load_checkpoint(tmp_path / "legs/pretrain/step-000000000168")[0]
    for stem in ("generator", "discriminator", "generator_ema"):
        movement = max(float((end[stem][name] - begin[stem][name]).abs().max()) for name in end[stem])
        difference = max(float((end[stem][name] - reached[stem][name]).abs().max()) for name in end[stem])
        assert movement > 1e-4 and difference <= 1e-3 * movement, (stem, difference, movement)
    for ours, theirs in zip(metrics_log(tmp_path / "legs"), metrics_log(tmp_path / "whole"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
