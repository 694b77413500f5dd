"""Meta-training in a run: which rules, from where the fan-out begins, what it costs, and over Ray the same bits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.leaderboard import _pays_from
from cluster.progress import timed
from cluster.recipe import Recipe
from cluster.run import derived, meta_recipes, plan_races, stage_seconds
from data_shards import UserError
from tests.toy import toy_set, toy_tree
from training.checkpoint import checkpoint_hash, load_checkpoint
from training.meta.metatrain import metatrain
from training.pretrain import pretrain
from training.recipe import resolve
from training.world import World

ALSO = {"fomaml": {"outer_optimizer": "adam", "outer_lr": 1e-3, "queries": 4},
        "maml": {"inner_optimizer": "sgd", "outer_lr": 1e-2, "queries": 4}}


def recipe_of(root: Path, methods: list[str], **meta: Any) -> Recipe:
    tree: dict[str, Any] = toy_tree(root, images=16)
    tree["meta"] = {**tree["meta"], **meta}
    tree["fanout"] = {"targets": [{"set": "target"}], "methods": methods, "candidates": 2, "seeds": 2}
    tree["cluster"] = {"workers": 1}
    return resolve(Recipe, tree, where="mine.yaml")


def test_a_run_meta_trains_by_the_rules_that_its_methods_begin_from(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, ["scratch", "finetune", "fomaml", "reptile"], also=ALSO)
    assert [one.meta.rule for one in meta_recipes(recipe)] == ["reptile", "fomaml"]
    assert [one.meta.rule for one in meta_recipes(recipe, every=True)] == ["reptile", "fomaml", "maml"]
    assert meta_recipes(recipe)[1].meta.outer_lr == 1e-3
    lines = [line for line in derived(recipe, tmp_path) if line.startswith("  meta")]
    assert lines == ["  meta      reptile: 3 steps x 2 tasks x 2 inner steps x 4 = 48 images",
                     "  meta      fomaml: 3 steps x 2 tasks x (2 inner steps x 4 + 4 queries) = 72 images"]
    assert meta_recipes(recipe_of(tmp_path, ["scratch", "finetune"])) == []


def test_a_method_without_its_meta_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the method fomaml begins from what the rule fomaml meta-learned, which is neither "
                                        r"meta\.rule nor in meta\.also; add meta\.also = \{fomaml: \{inner_optimizer: sgd\}\}, "
                                        r"with what else differs, or drop the method"):
        recipe_of(tmp_path, ["scratch", "fomaml"])
    with pytest.raises(UserError, match=r"meta\.steps is 0"):
        recipe_of(tmp_path, ["scratch", "fomaml"], also={"fomaml": {"steps": 0}})
    recipe_of(tmp_path, ["scratch", "fomaml"], rule="fomaml")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_over_ray_it_gives_the_bits_of_one_process_and_the_fan_out_begins_there(tmp_path: Path) -> None:
    import ray

    from cluster.metatrain import metatrain_on_ray

    source = toy_set(tmp_path / "source")
    toy_set(tmp_path / "target", train=24, reference=24, seed=5)
    methods = ["scratch", "finetune", "reptile", "fomaml", "maml"]
    recipe, run = recipe_of(tmp_path, methods, also=ALSO, tasks=3), tmp_path / "run"
    start = pretrain(recipe, source, run, World())
    with pytest.raises(UserError, match="has no weights that reptile meta-learned by this recipe; run `graft metatrain` first"):
        plan_races(recipe, source, run)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        found = {one.meta.rule: metatrain_on_ray(one, source, run, start) for one in meta_recipes(recipe)}
    finally:
        ray.shutdown()
    for one in meta_recipes(recipe):
        here = load_checkpoint(metatrain(one, source, tmp_path / "here", start, checkpoint_hash(start)))[0]
        there = load_checkpoint(found[one.meta.rule])[0]
        assert here.keys() == there.keys()
        assert all(torch.equal(value, there[stem][key]) for stem, named in here.items() for key, value in named.items())
    begins = {race.method: race.search[0].trial for race in plan_races(recipe, source, run)}
    assert begins["scratch"].start == "scratch"
    assert begins["finetune"].start == "pretrain"
    for rule, checkpoint in found.items():
        assert (begins[rule].start, begins[rule].checkpoint) == (f"meta:{checkpoint.parent.name}", str(checkpoint))
        assert begins[rule].checkpoint_sha256 == checkpoint_hash(checkpoint)
    assert len({trial.checkpoint_sha256 for trial in begins.values()}) == 5


def test_a_meta_training_s_cost_is_that_of_its_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 30.0, 100.0, 150.0, 200.0, 210.0])
    monkeypatch.setattr("cluster.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    for rule in ("reptile", "fomaml", "reptile"):
        with timed(tmp_path, "meta", rule):
            pass
    costs = stage_seconds(tmp_path)
    assert costs == {"meta_seconds": 90.0, "meta_reptile_seconds": 40.0, "meta_fomaml_seconds": 50.0}
    rows = [{"domain": "d", "method": method, "phase": "final", "status": "finished", "trial": method, "seconds": 10.0}
            for method in ("scratch", "finetune", "reptile", "fomaml")]
    monkeypatch.setattr("cluster.leaderboard.read_events", lambda path: [
        {"images": images, "metrics": {"selection_kid": 1.0}} for images in (50, 100)])
    paid = _pays_from(tmp_path, rows, [{"domain": "d"}], {**costs, "pretrain_seconds": 100.0})
    assert paid == {"finetune": 20.0, "reptile": 28.0, "fomaml": 30.0}  # each saves 5 s a domain
