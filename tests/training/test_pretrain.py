"""Pretraining through its own entry points: exact resume, one and two workers, data and noise that differ by rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from data_shards import UserError, batches, open_set
from data_shards.stores import open_store
from tests.ranks import run_ranks
from tests.toy import toy_recipe, toy_set, toy_tree
from training.__main__ import main
from training.checkpoint import latest_valid, load_checkpoint
from training.events import read_events
from training.loop import NonFinite
from training.pretrain import finished_pretraining, pretrain
from training.world import World


def metrics_log(run: Path) -> list[dict[str, Any]]:
    """The log without its time fields."""
    timed = ("images_per_second", "data_wait")
    return [{"images": event["images"], **{k: v for k, v in event["metrics"].items()
                                            if k not in timed and not k.startswith("cost/")}}
            for event in read_events(run / "pretrain" / "events.jsonl")]


def test_an_interrupted_run_ends_bit_equal_to_an_uninterrupted_one(tmp_path: Path) -> None:
    source = toy_set(tmp_path / "source")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pretrain(toy_recipe(tmp_path), source, whole, World())
    pretrain(toy_recipe(tmp_path, images=32), source, parts, World())
    assert finished_pretraining(toy_recipe(tmp_path), source, parts / "pretrain") is None
    last = pretrain(toy_recipe(tmp_path), source, parts, World())
    assert finished_pretraining(toy_recipe(tmp_path), source, parts / "pretrain") == last
    expected, _ = load_checkpoint(whole / "pretrain" / last.name)
    resumed, state = load_checkpoint(last)
    assert set(expected) == {"generator", "generator_ema", "discriminator", "generator_optimizer", "discriminator_optimizer"}
    for stem, named in expected.items():
        assert named.keys() == resumed[stem].keys()
        assert all(torch.equal(named[name], resumed[stem][name]) for name in named), stem
    assert metrics_log(whole) == metrics_log(parts)
    assert state["data_position"] == {"pass": 0, "samples": 64}


def test_a_mixture_of_sets_and_balanced_classes_resumes_bit_equal_and_is_another_pretraining(tmp_path: Path) -> None:
    source = toy_set(tmp_path / "source")
    toy_set(tmp_path / "second", seed=1)
    changes: dict[str, dict[str, Any]] = {"mix": {"mix": {"second": 0.5}}, "balanced": {"class_weights": "balanced"},
                                          "named": {"class_weights": {"cross": 1.0}}}
    for name, data in changes.items():
        recipe = toy_recipe(tmp_path)
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=data)})
        short = recipe.model_copy(update={"training": recipe.training.model_copy(update={"images": 32})})
        last = pretrain(recipe, source, tmp_path / name, World())
        pretrain(short, source, tmp_path / f"{name}-parts", World())
        resumed = pretrain(recipe, source, tmp_path / f"{name}-parts", World())
        expected, found = (load_checkpoint(folder, ("generator",))[0]["generator"] for folder in (last, resumed))
        assert all(torch.equal(expected[key], found[key]) for key in expected)
        with pytest.raises(UserError, match="another --out"):
            pretrain(toy_recipe(tmp_path), source, tmp_path / name, World())


def test_a_source_in_an_object_store_is_pretrained_on_by_its_url(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    local, store = toy_set(tmp_path / "source"), open_store("memory://toy/source")
    for path in local.path.rglob("*.*"):
        store.put(path, path.relative_to(local.path).as_posix())
    (tmp_path / "far.yaml").write_text(yaml.safe_dump(toy_tree(tmp_path, images=16)))
    assert main([str(tmp_path / "far.yaml"), "--set", "data.root=memory://toy", "--out", str(tmp_path / "far")]) == 0
    pretrain(toy_recipe(tmp_path, images=16), local, tmp_path / "near", World())
    far, near = (load_checkpoint(latest_valid(tmp_path / run / "pretrain") or tmp_path, ("generator",))[0]["generator"]
                 for run in ("far", "near"))
    assert all(torch.equal(far[name], near[name]) for name in near)


def test_another_recipe_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    source = toy_set(tmp_path / "source")
    pretrain(toy_recipe(tmp_path, images=16), source, tmp_path / "run", World())
    with pytest.raises(UserError, match="another --out"):
        pretrain(toy_recipe(tmp_path, batch=4), source, tmp_path / "run", World())


def test_fewer_images_than_a_folder_holds_are_refused(tmp_path: Path) -> None:
    source = toy_set(tmp_path / "source")
    pretrain(toy_recipe(tmp_path, images=20), source, tmp_path / "run", World())
    assert finished_pretraining(toy_recipe(tmp_path, images=20), source, tmp_path / "run" / "pretrain"), "24 = 3 whole batches"
    with pytest.raises(UserError, match="of 24 images, and 16 are asked for"):
        finished_pretraining(toy_recipe(tmp_path, images=16), source, tmp_path / "run" / "pretrain")


def test_divergence_stops_and_saves_nothing_broken(tmp_path: Path) -> None:
    source = toy_set(tmp_path / "source")
    recipe = toy_recipe(tmp_path, generator={"channels": 4, "latent_dim": 4, "lr": 1e30})
    with pytest.raises(NonFinite, match="not finite"):
        pretrain(recipe, source, tmp_path / "run", World())
    newest = latest_valid(tmp_path / "run" / "pretrain")
    assert newest is None or all(bool(torch.isfinite(t).all()) for t in load_checkpoint(newest)[0]["generator"].values())


def pretrained_weights(world: World, root: str, run: str, kind: str) -> dict[str, Tensor]:
    recipe = toy_recipe(Path(root), engine={"kind": kind, "zero": 2}, images=48)
    last = pretrain(recipe, open_set(Path(root) / "source"), Path(run), world)
    torch.distributed.barrier() if world.size > 1 else None
    return load_checkpoint(last, ("generator_ema",))[0]["generator_ema"]


def test_one_worker_and_two_give_the_same_run(tmp_path: Path) -> None:
    toy_set(tmp_path / "source")
    one = pretrained_weights(World(), str(tmp_path), str(tmp_path / "one"), "torch")
    two = run_ranks(pretrained_weights, 2, str(tmp_path), str(tmp_path / "two"), "deepspeed")[0]
    movement = 48 / 8 * 2e-4  # Adam moves a weight by at most its rate each step
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-3 * movement)
    for ours, theirs in zip(metrics_log(tmp_path / "one"), metrics_log(tmp_path / "two"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_two_ranks_see_different_samples_that_make_up_the_global_batch(tmp_path: Path) -> None:
    source = toy_set(tmp_path / "source")
    ranks = [next(batches(source, batch=8, seed=0, rank=rank, world=2)).keys for rank in range(2)]
    whole = next(batches(source, batch=8, seed=0)).keys
    assert not set(ranks[0]) & set(ranks[1])
    assert [key for pair in zip(*ranks, strict=True) for key in pair] == whole


def test_the_module_pretrains_without_ray(tmp_path: Path) -> None:
    toy_set(tmp_path / "source")
    tree = toy_tree(tmp_path) | {"fanout": {"targets": []}, "cluster": {"workers": 2}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    blocked = ("import sys, runpy\n"
               "class Block:\n"
               "    def find_spec(self, name, path=None, target=None):\n"
               "        if name.partition('.')[0] in ('ray', 'deepspeed', 'wandb'): raise ImportError(name)\n"
               "sys.meta_path.insert(0, Block())\n"
               f"sys.argv = ['training', {str(tmp_path / 'mine.yaml')!r}, '--out', {str(tmp_path / 'run')!r}]\n"
               "runpy.run_module('training', run_name='__main__', alter_sys=True)\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "64/64 images" in done.stdout
    assert json.loads((latest_valid(tmp_path / "run" / "pretrain") / "state.json").read_text())["images"] == 64  # type: ignore[operator]
