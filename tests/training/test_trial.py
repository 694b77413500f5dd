"""Trials: rungs, methods that do what they are called, scores of the right set, the same conditions for every method."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data_shards import UserError, load_images, open_set
from tests.toy import stroke_set, toy_recipe, toy_set, toy_tree
from training import trial as trials
from training.checkpoint import checkpoint_hash, load_checkpoint
from training.config import apply_overrides
from training.events import read_events
from training.metrics.encoder import save_encoder, train_encoder
from training.metrics.kid import kid
from training.pretrain import pretrain
from training.recipe import TrainingRecipe
from training.target import feature_net, load_target, support_indices, support_keys
from training.trial import Trial, read_row, run_trial, trial_folder, trial_id
from training.world import World


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a pretrained source, an encoder and a target set beside it."""
    root = tmp_path_factory.mktemp("root")
    source = toy_set(root / "source")
    toy_set(root / "target", train=24, reference=24, seed=5)
    pretrain(toy_recipe(root), source, root / "run", World())
    images, labels = load_images(source, source.indices())
    save_encoder(train_encoder(images, labels, classes=2, seed=0, images_budget=512, threads=1),
                 root / "run" / "encoder.safetensors")
    return root / "run"


def make_trial(run: Path, method: str = "finetune", **changes: Any) -> Trial:
    checkpoint = run / "pretrain" / "step-000000000064"
    scratch = method == "scratch"
    trial = Trial("bars", str(run.parent / "target"), method, 1, "final", "scratch" if scratch else "pretrain",
                  None if scratch else str(checkpoint), None if scratch else checkpoint_hash(checkpoint))
    return dataclasses.replace(trial, **changes)


def weights_of(run: Path, trial: Trial, recipe: TrainingRecipe) -> dict[str, dict[str, torch.Tensor]]:
    return load_checkpoint(trial_folder(run, trial, trial_id(trial, recipe)) / "best")[0]


def test_a_final_row_has_every_field_and_the_scores_of_the_reference_set(run: Path) -> None:
    recipe = toy_recipe(run.parent)
    row = run_trial(make_trial(run), recipe, run, until=32)
    fields = {*"domain method start seed trial status shots images_budget images_seen seconds gpu_hours".split(),  # noqa: SIM905
              *"kid kid_ci95 fd fid precision recall density coverage copy_rate auth_pct".split(),  # noqa: SIM905
              "disqualified", "reason", "checkpoint"}
    assert fields <= row.keys()
    assert (row["status"], row["images_seen"], row["start"], row["fid"]) == ("finished", 32, "pretrain", None)
    # Scored again here, from the checkpoint, on the reference split read by hand: the same number, and not the pool's.
    target = open_set(run.parent / "target")
    net = feature_net("encoder", str(run))
    again = trials.rescore(row, recipe, run, set_path=str(run.parent / "target"), net="encoder")
    assert again["kid"] == pytest.approx(row["kid"], rel=1e-6)
    from training.draws import latents
    from training.networks import load_weights, make_networks
    from training.pictures import generate

    network = make_networks(recipe.training, (1, 16, 16), 0)["generator"]
    load_weights(network, load_checkpoint(run / row["checkpoint"])[0]["generator_ema"], what="best")
    fake = net.extract(generate(network, latents(1, "evaluation", 0, 32, 4)))
    reference = net.extract(load_images(target, target.indices("reference"))[0])
    pool = net.extract(load_images(target, target.indices("train"))[0])
    assert row["kid"] == pytest.approx(kid(fake, reference), rel=1e-6)
    assert row["kid"] != pytest.approx(kid(fake, pool), rel=1e-3)
    json.dumps(row, allow_nan=False)


def test_a_finished_trial_is_not_run_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, trial = toy_recipe(run.parent), make_trial(run, seed=7)
    first = run_trial(trial, recipe, run, until=32)
    monkeypatch.setattr(trials, "train", lambda *_, **__: pytest.fail("trained again"))
    assert run_trial(trial, recipe, run, until=32) == first


@pytest.mark.parametrize("phase", ["search", "final"])
def test_a_trial_killed_before_its_row_was_written_gives_the_same_row(run: Path, phase: str) -> None:
    recipe, trial = toy_recipe(run.parent), make_trial(run, phase=phase, seed=11)
    first = run_trial(trial, recipe, run, until=32)
    (trial_folder(run, trial, first["trial"]) / "row.json").unlink()
    again = run_trial(trial, recipe, run, until=32)
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    log = read_events(trial_folder(run, trial, first["trial"]) / "events.jsonl")
    assert [event["images"] for event in log] == [8, 16, 24, 32]


def test_rungs_end_where_an_uninterrupted_trial_ends(run: Path) -> None:
    recipe = toy_recipe(run.parent)
    whole, stepwise = make_trial(run, phase="search", seed=3), make_trial(run, phase="search", seed=3, domain="same")
    run_trial(whole, recipe, run, until=32)
    for until in (8, 16, 32):
        row = run_trial(stepwise, recipe, run, until=until)
        assert row["images_seen"] == until
    assert set(row["rungs"]) == {"8", "16", "32"}
    expected, ours = weights_of(run, whole, recipe), weights_of(run, stepwise, recipe)
    for stem, named in expected.items():
        assert all(torch.equal(named[name], ours[stem][name]) for name in named), stem
    log = read_events(trial_folder(run, stepwise, trial_id(stepwise, recipe)) / "events.jsonl")
    assert [event["images"] for event in log] == [8, 16, 24, 32]


def test_scratch_starts_fresh_and_finetune_from_the_source(run: Path) -> None:
    tree = apply_overrides(toy_tree(run.parent), {"adaptation.lr": 0.0, "adaptation.images": 4})
    recipe = TrainingRecipe.model_validate(tree)
    source = load_checkpoint(run / "pretrain" / "step-000000000064")[0]
    for method, equal in (("finetune", True), ("scratch", False)):
        trial = make_trial(run, method, phase="search")
        run_trial(trial, recipe, run, until=4)
        ours = weights_of(run, trial, recipe)
        assert torch.equal(ours["generator"]["project.weight"], source["generator_ema"]["project.weight"]) is equal
        assert torch.equal(ours["discriminator"]["blocks.0.weight"], source["discriminator"]["blocks.0.weight"]) is equal


def test_freezed_keeps_its_blocks_bit_for_bit_and_moves_the_rest(run: Path) -> None:
    recipe = toy_recipe(run.parent)
    source = load_checkpoint(run / "pretrain" / "step-000000000064")[0]["discriminator"]
    for frozen in (1, 2):
        trial = make_trial(run, "freezed", phase="search", hyperparameters={"adaptation.frozen_blocks": frozen})
        run_trial(trial, recipe, run, until=16)
        ours = weights_of(run, trial, recipe)["discriminator"]
        for block in range(2):
            assert torch.equal(ours[f"blocks.{block}.weight"], source[f"blocks.{block}.weight"]) is (block < frozen)
        assert not torch.equal(ours["head.weight"], source["head.weight"])
    with pytest.raises(UserError, match="use 1 to 2"):
        run_trial(make_trial(run, "freezed", hyperparameters={"adaptation.frozen_blocks": 5}), recipe, run, until=8)


def test_the_id_follows_what_decides_the_result_and_nothing_else(run: Path) -> None:
    recipe, trial = toy_recipe(run.parent), make_trial(run)
    identity = trial_id(trial, recipe)
    same: dict[str, object] = {"wandb.project": "other", "data.workers": 3, "training.report_every_images": 8, "name": "x",
                               "training.engine.kind": "deepspeed", "training.images": 999, "meta.steps": 9}
    for key, value in same.items():
        other = TrainingRecipe.model_validate(apply_overrides(toy_tree(run.parent), {key: value}))
        assert trial_id(trial, other) == identity, key
    unlike: dict[str, object] = {"adaptation.lr": 1e-5, "adaptation.shots": 3, "evaluation.samples": 8, "seed": 4}
    for key, value in unlike.items():
        other = TrainingRecipe.model_validate(apply_overrides(toy_tree(run.parent), {key: value}))
        assert trial_id(trial, other) != identity, key
    for change in ({"seed": 2}, {"method": "freezed"}, {"phase": "search"}, {"checkpoint_sha256": "0" * 64},
                   {"hyperparameters": {"adaptation.lr": 1e-3}}, {"domain": "y"}):
        assert trial_id(dataclasses.replace(trial, **change), recipe) != identity
    assert trial_id(dataclasses.replace(trial, checkpoint="/elsewhere"), recipe) == identity


def test_hyper_parameters_reach_the_training(run: Path) -> None:
    recipe = toy_recipe(run.parent)
    rows = [run_trial(make_trial(run, hyperparameters={"adaptation.lr": lr}, seed=9), recipe, run, until=32)
            for lr in (1e-5, 1e-2)]
    assert rows[0]["kid"] != rows[1]["kid"]


def test_support_sets_depend_on_the_seed_and_not_on_the_method(run: Path) -> None:
    target = open_set(run.parent / "target")
    assert support_indices(target, 5, 1) == support_indices(target, 5, 1) != support_indices(target, 5, 2)
    loaded = load_target(str(target.path), 5, 1)
    assert len(loaded.support) == 5
    assert len(loaded.held_back) == 19
    assert len(loaded.reference) == 24
    pool = {bytes(image.numpy().tobytes()) for image in loaded.held_back}
    assert not any(bytes(image.numpy().tobytes()) in pool for image in loaded.support)


def test_support_sets_are_published_by_key(run: Path) -> None:
    target = open_set(run.parent / "target")
    published = support_keys(target, 5, [1, 2])
    assert list(published) == ["1", "2"] and published["1"] != published["2"]
    where = {key.decode(): number for number, key in enumerate(target.samples["key"].tolist())}
    images = load_images(target, [where[key] for key in published["1"]])[0]
    assert torch.equal(images, load_target(str(target.path), 5, 1).support)


def test_a_domain_smaller_than_its_shots_is_refused(tmp_path: Path) -> None:
    target = toy_set(tmp_path / "small", train=9, reference=9)
    with pytest.raises(UserError, match=r"has 9 images in its support pool and needs at least 18: adaptation\.shots = 10"):
        support_indices(target, 10, 0)
    with pytest.raises(UserError, match=r"at least 10: .* 2 to train on and 8 held back"):
        support_indices(target, 2, 0)
    assert len(support_indices(target, 1, 0)) == 1


def test_a_generator_trained_until_it_copies_is_disqualified(run: Path) -> None:
    """Five strokes, ever more steps: nothing like them at first, hardly anything but them in the end."""
    stroke_set(run.parent / "strokes")
    rows = []
    for steps in (50, 600):
        tree = apply_overrides(toy_tree(run.parent), {
            "training.generator": {"channels": 16, "latent_dim": 8}, "training.discriminator.channels": 16,
            "adaptation.images": 8 * steps, "adaptation.batch": 8, "adaptation.lr": 2e-3, "evaluation.samples": 100})
        trial = make_trial(run, "scratch", domain="strokes", set_path=str(run.parent / "strokes"))
        rows.append(run_trial(trial, TrainingRecipe.model_validate(tree), run, until=8 * steps))
    assert rows[0]["copy_rate"] < 0.2 and not rows[0]["disqualified"]
    assert rows[1]["copy_rate"] > 0.6 and rows[1]["disqualified"] and "copies its support" in rows[1]["reason"]
    again = trials.rescore(rows[1], TrainingRecipe.model_validate(tree), run, set_path=trial.set_path, net="encoder")
    assert again["copy_rate"] == rows[1]["copy_rate"]


def test_a_diverged_trial_is_a_failed_row(run: Path) -> None:
    row = run_trial(make_trial(run, hyperparameters={"adaptation.lr": 1e30}), toy_recipe(run.parent), run, until=32)
    assert row["status"] == "failed"
    assert "not finite" in row["reason"]
    assert row["kid"] is None
    assert read_row(trial_folder(run, make_trial(run), row["trial"])) == row
