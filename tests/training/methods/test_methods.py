"""What every method of transfer must do, whatever the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from data_shards import UserError
from tests.training.methods.start import SMALL, adaptation_of, batch_of, recipe_of, start_of, trial_of, weights_of
from training.checkpoint import load_checkpoint
from training.methods import METHODS
from training.trial import run_trial, trial_id

OURS = ("freezeg", "l2sp", "ewc", "bss", "distill", "projected", "structure")


@pytest.mark.parametrize("method", OURS)
def test_a_search_trial_that_went_on_ends_as_one_that_never_stopped(run: Path, method: str) -> None:
    recipe = recipe_of(run.parent, {"training.discriminator.spectral_norm": True})
    whole, stepwise = trial_of(run, recipe, method), trial_of(run, recipe, method, domain="same")
    row = run_trial(whole, recipe, run, until=32)
    assert (row["status"], row["images_seen"]) == ("finished", 32)
    for until in (8, 16, 32):
        run_trial(stepwise, recipe, run, until=until)
    expected, ours = weights_of(run, whole, recipe), weights_of(run, stepwise, recipe)
    assert expected.keys() == ours.keys()
    for stem, named in expected.items():
        assert all(torch.equal(named[name], ours[stem][name]) for name in named), stem


@pytest.mark.parametrize("method", OURS)
def test_a_final_trial_keeps_the_familys_own_generator(run: Path, method: str) -> None:
    recipe = recipe_of(run.parent)
    trial = trial_of(run, recipe, method, phase="final", seed=2)
    row = run_trial(trial, recipe, run, until=32)
    assert row["status"] == "finished" and row["kid"] is not None
    plain = start_of(recipe)["generator"].state_dict()
    kept = load_checkpoint(run / row["checkpoint"])[0]
    assert kept.keys() == {"generator_ema"} and kept["generator_ema"].keys() == plain.keys()


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("model", SMALL)
def test_every_model_can_be_stepped(tmp_path: Path, model: str, method: str) -> None:
    """With packing, minibatch deviation and classes too: each loss is finite and reaches what is trained."""
    for settings in ({}, {"training.discriminator.minibatch_std": 2, "training.objective.pack": 2},
                     {"training.generator.classes": 2}):
        recipe = recipe_of(tmp_path, settings, model)
        networks = start_of(recipe)
        adaptation = adaptation_of(recipe, networks)
        METHODS[method].prepare(networks, adaptation)
        batch = dataclasses.replace(batch_of(recipe), labels=torch.tensor([0, 1, 1, 0]))
        for phase in METHODS[method].phases(adaptation):
            network = networks[phase.network]
            trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
            loss = phase.loss(networks, batch)["total"]
            gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            assert loss.isfinite()
            missed = [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]
            assert all("class_embedding" in name for name in missed), missed


@pytest.mark.parametrize(("key", "method"), [
    ("l2sp.generator", "l2sp"), ("l2sp.discriminator", "l2sp"), ("ewc.weight", "ewc"), ("bss.weight", "bss"),
    ("distill.weight", "distill"), ("projected.channels", "projected"), ("freezeg.parts", "freezeg")])
def test_a_method_reads_its_section_and_no_other_method_does(run: Path, key: str, method: str) -> None:
    assert key in METHODS[method].hyperparameters
    value = ["late"] if key == "freezeg.parts" else 7
    recipe, other = recipe_of(run.parent), recipe_of(run.parent, {f"adaptation.{key}": value})
    assert trial_id(trial_of(run, recipe, method), recipe) != trial_id(trial_of(run, other, method), other)
    assert trial_id(trial_of(run, recipe, "finetune"), recipe) == trial_id(trial_of(run, other, "finetune"), other)
    rows = [run_trial(trial_of(run, recipe, method, seed=5, hyperparameters=values), recipe, run, until=16)
            for values in ({}, {f"adaptation.{key}": value})]
    ours = [weights_of(run, trial_of(run, recipe, method, seed=5, hyperparameters=row["hyperparameters"]), recipe)
            for row in rows]
    assert any(a.shape != b.shape or not torch.equal(a, b) for stem in ours[0].keys() & ours[1].keys()
               for a, b in ((ours[0][stem][name], ours[1][stem][name]) for name in ours[0][stem].keys() & ours[1][stem].keys()))


def test_where_there_is_no_discriminator_a_method_works_or_says_so(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    networks = {"generator": start_of(recipe)["generator"]}
    adaptation = adaptation_of(recipe, networks)
    adaptation = dataclasses.replace(adaptation, phases=[phase for phase in adaptation.phases if phase.network == "generator"])
    for name in ("freezeg", "l2sp"):
        METHODS[name].prepare(networks, adaptation)
        assert [phase.network for phase in METHODS[name].phases(adaptation)] == ["generator"]
    for name in ("ewc", "bss", "distill", "projected"):
        with pytest.raises(UserError, match=rf"^the method {name} .* whole images, which the family gan has none of; leave it"):
            METHODS[name].prepare(networks, adaptation)
            METHODS[name].phases(adaptation)


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("family", ["vae", "vaegan"])
def test_trials_of_variational_families(run: Path, family: str, method: str) -> None:
    """A VAE has no discriminator and a VAE-GAN has one; what a method can do it does, in rungs as in one go."""
    recipe = recipe_of(run.parent, {"training.family": family})
    whole, stepwise = trial_of(run, recipe, method, seed=6), trial_of(run, recipe, method, domain="same", seed=6)
    if family == "vae" and method in ("ewc", "bss", "distill", "projected"):
        with pytest.raises(UserError, match="which the family vae has none of"):
            run_trial(whole, recipe, run, until=16)
        return
    for until in (8, 16):
        row = run_trial(stepwise, recipe, run, until=until)
    assert (row["status"], row["images_seen"]) == ("running", 16)
    run_trial(whole, recipe, run, until=16)
    expected, ours = weights_of(run, whole, recipe), weights_of(run, stepwise, recipe)
    assert all(torch.equal(ours[stem][name], value) for stem, named in expected.items() for name, value in named.items())
