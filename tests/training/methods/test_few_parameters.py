"""What transfer by few parameters, by a miner, by correspondence and by translation has in common: whole trials."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from data_shards import UserError
from tests.training.methods.start import SMALL, adaptation_of, batch_of, recipe_of, start_of, trial_of, weights_of
from tests.training.models.make import latents
from training.checkpoint import load_checkpoint
from training.methods import METHODS, Adaptation
from training.networks import make_networks
from training.trial import AVERAGE, run_trial

FROZEN = ("bsa", "fsgan", "lora")
OURS = (*FROZEN, "adam", "minegan", "cdc", "rssa", "converter")


@pytest.mark.parametrize("method", OURS)
def test_a_search_trial_that_went_on_ends_as_one_that_never_stopped(run: Path, method: str) -> None:
    recipe = recipe_of(run.parent)
    whole, stepwise = trial_of(run, recipe, method), trial_of(run, recipe, method, domain="same")
    row = run_trial(whole, recipe, run, until=32)
    assert (row["status"], row["images_seen"]) == ("finished", 32)
    for until in (12, 16, 32):
        run_trial(stepwise, recipe, run, until=until)
    expected, ours = weights_of(run, whole, recipe), weights_of(run, stepwise, recipe)
    assert expected.keys() == ours.keys()
    for stem, named in expected.items():
        assert named.keys() == ours[stem].keys()
        assert all(torch.equal(named[name], ours[stem][name]) for name in named), stem


@pytest.mark.parametrize("method", OURS)
def test_a_final_trial_keeps_the_familys_own_generator(run: Path, method: str) -> None:
    recipe = recipe_of(run.parent)
    row = run_trial(trial_of(run, recipe, method, phase="final", seed=2), recipe, run, until=32)
    assert row["status"] == "finished" and row["kid"] is not None
    kept = load_checkpoint(run / row["checkpoint"])[0]
    assert kept.keys() == {"generator_ema"}
    names = {name for name in kept["generator_ema"] if not name.startswith("miner.")}
    assert names == {*start_of(recipe)["generator"].state_dict()}


@pytest.mark.parametrize("method", [*FROZEN, "adam"])
def test_the_merged_generator_makes_what_the_trained_one_makes(run: Path, method: str) -> None:
    recipe = recipe_of(run.parent, {"adaptation.lr": 2e-3})
    trial = trial_of(run, recipe, method, domain="merged")
    run_trial(trial, recipe, run, until=32)
    weights = weights_of(run, trial, recipe)
    networks = start_of(recipe)
    METHODS[method].prepare(networks, dataclasses.replace(adaptation_of(recipe, networks), resumed=True))
    networks["generator"].load_state_dict(weights[AVERAGE])
    plain = start_of(recipe)["generator"]
    z = latents(6, dim=4)
    start = plain(z)
    plain.load_state_dict(weights["generator_ema"])
    torch.testing.assert_close(plain(z), networks["generator"](z), rtol=1e-5, atol=1e-6)
    assert (plain(z) - start).abs().max() > 1e-3


@pytest.mark.parametrize("method", FROZEN)
@pytest.mark.parametrize("model", SMALL)
def test_frozen_weights_do_not_move_and_the_others_do(run: Path, method: str, model: str) -> None:
    recipe = recipe_of(run.parent, model=model)
    trial = trial_of(run, recipe, method)
    run_trial(trial, recipe, run, until=32)
    networks = start_of(recipe)
    METHODS[method].prepare(networks, adaptation_of(recipe, networks))
    weights = weights_of(run, trial, recipe)
    for name, network in networks.items():
        for key, before in network.named_parameters():
            same = torch.equal(weights[name][key], before)
            assert same is not before.requires_grad or "class_embedding" in key, f"{name}.{key}"


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("model", SMALL)
def test_every_model_can_be_stepped(run: Path, method: str, model: str) -> None:
    """Told classes and with spectral normalisation of D, too, where the method does not refuse it."""
    if (method, model) in (("cdc", "mlp"), ("rssa", "mlp")):
        pytest.skip("refused: test_cdc.py")
    recipe = recipe_of(run.parent, model=model)
    row = run_trial(trial_of(run, recipe, method), recipe, run, until=32)
    assert (row["status"], row["images_seen"]) == ("finished", 32)
    if method in ("fsgan", "adam", "minegan", "converter"):
        return
    settings = {"training.generator.classes": 2, "training.discriminator.minibatch_std": 2,
                **({} if model == "r3gan" else {"training.discriminator.spectral_norm": True})}
    recipe = recipe_of(run.parent, settings, model)
    networks = start_of(recipe)
    adaptation = adaptation_of(recipe, networks)
    METHODS[method].prepare(networks, adaptation)
    draws = {f"{name} anchor": torch.rand(4, 1, dtype=torch.float64) for name in networks}
    batch = dataclasses.replace(batch_of(recipe), labels=torch.tensor([0, 1, 1, 0]), uniforms=draws)
    for phase in METHODS[method].phases(adaptation):
        trained = [p for p in networks[phase.network].parameters() if p.requires_grad]
        loss = phase.loss(networks, batch)["total"]
        assert loss.isfinite()
        assert any(gradient is not None for gradient in torch.autograd.grad(loss, trained, allow_unused=True))


@pytest.mark.parametrize("method", ["adam", "minegan"])
def test_what_a_recipe_freezes_stays_in_a_methods_own_stage_too(run: Path, method: str) -> None:
    recipe = recipe_of(run.parent, {"adaptation.frozen": ["discriminator.blocks.0.*", "generator.blocks.1.bias"]})
    trial = trial_of(run, recipe, method, domain="frozen")
    run_trial(trial, recipe, run, until=32)
    source, weights = start_of(recipe), weights_of(run, trial, recipe)
    for name, key in (("discriminator", "blocks.0.bias"), ("generator", "blocks.1.bias")):
        assert torch.equal(weights[name][key], source[name].state_dict()[key])
    assert not torch.equal(weights["discriminator"]["blocks.1.bias"], source["discriminator"].state_dict()["blocks.1.bias"])


@pytest.mark.parametrize("method", sorted(set(OURS) - {"minegan"}))
def test_a_vae_is_adapted_and_goes_on_after_a_rung(run: Path, method: str) -> None:
    recipe = recipe_of(run.parent, {"training.family": "vae", "adaptation.lr": 1e-3})
    whole, stepwise = trial_of(run, recipe, method), trial_of(run, recipe, method, domain="same")
    row = run_trial(whole, recipe, run, until=32)
    assert (row["status"], row["images_seen"]) == ("finished", 32)
    for until in (16, 32):
        run_trial(stepwise, recipe, run, until=until)
    expected, ours = weights_of(run, whole, recipe), weights_of(run, stepwise, recipe)
    assert all(torch.equal(value, ours[stem][name]) for stem, named in expected.items() for name, value in named.items())
    source = start_of(recipe)["generator"].state_dict()
    assert expected["generator_ema"].keys() == source.keys()
    assert any(not torch.equal(value, source[name]) for name, value in expected["generator_ema"].items())


@pytest.mark.parametrize("method", [*FROZEN, "adam", "cdc", "rssa"])
@pytest.mark.parametrize("family", ["sequence", "density"])
def test_a_family_of_other_layers_is_refused(run: Path, family: str, method: str) -> None:
    recipe = recipe_of(run.parent, {"training.family": family})
    networks = make_networks(recipe.training, (3, 1, 16), 0)
    adaptation = Adaptation(recipe, networks, torch.zeros(4, 3, 1, 16, dtype=torch.uint8), 1, [])
    with pytest.raises(UserError, match=rf"the method {method} (works|compares) .*; leave it out of fanout\.methods\."):
        METHODS[method].prepare(networks, adaptation)


def test_minegan_is_refused_for_a_family_that_can_have_no_miner(run: Path) -> None:
    recipe = recipe_of(run.parent, {"training.family": "vae"})
    with pytest.raises(UserError, match=r"which the method minegan sets, .* the family is vae; .* leave minegan out"):
        run_trial(trial_of(run, recipe, "minegan"), recipe, run, until=32)
