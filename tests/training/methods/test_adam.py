"""AdAM: importance is the Fisher information of the modulation; important kernels are modulated, others fine-tuned."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from data_shards import Batch as Images
from tests.training.methods.start import SMALL, adaptation_of, pictures, recipe_of, start_of, trial_of, weights_of
from tests.training.models.make import latents
from training.draws import latents as draw_latents
from training.families import Phase
from training.loop import Plan, State, train
from training.methods.adam import above_quantile, importance, modulate
from training.methods.kernels import as_rows, is_transposed, layers_of, weight_of
from training.methods.method import Adaptation
from training.methods.stage import squared_gradients
from training.recipe import TrainingRecipe
from training.trial import run_trial


def trained_on(recipe: TrainingRecipe, networks: dict[str, nn.Module]) -> Adaptation:
    """An adaptation that trains on four pictures, all of them in each batch."""
    def feed() -> Iterator[Images]:
        images = (pictures(4) * 127.5 + 127.5).round().to(torch.uint8)
        while True:
            yield Images(images, torch.full((4,), -1), torch.zeros(4), np.array([b"picture"] * 4), 0)

    def on_pictures(state: State, phases: Sequence[Phase], until: int, **changes: Any) -> None:
        plan = Plan(until=until, batch=4, seed=1, latent_dim=4, lr=dict.fromkeys(networks, 1e-3), weights={"r1": 1.0},
                    ema_halflife_images=0.0)
        train(state, phases, feed(), dataclasses.replace(plan, **changes))

    return dataclasses.replace(adaptation_of(recipe, networks), train=on_pictures)


def test_the_fisher_information_is_the_mean_square_of_single_images_gradients(tmp_path: Path) -> None:
    """Against a loop over the images, with the losses written out."""
    recipe = recipe_of(tmp_path)
    networks = start_of(recipe)
    before = copy.deepcopy({name: network.state_dict() for name, network in networks.items()})
    found = squared_gradients(networks, trained_on(recipe, networks), 8, 16)
    g, d = networks["generator"], networks["discriminator"]
    expected = {name: {key: torch.zeros_like(p) for key, p in network.named_parameters()} for name, network in networks.items()}
    reals = (pictures(4) * 127.5 + 127.5).round() / 127.5 - 1
    for seen in (8, 12):
        for name, network in networks.items():
            zs = draw_latents(1, name, seen, 4, 4)
            for z, real in zip(zs, reals, strict=True):
                margin = d(real[None]) - d(g(z[None]))
                loss = nn.functional.softplus(margin if name == "generator" else -margin).squeeze()
                for key, p in network.named_parameters():
                    (gradient,) = torch.autograd.grad(loss, p, retain_graph=True)
                    expected[name][key] += gradient.square() / 8
    for name, named in expected.items():
        assert found[name].keys() == named.keys()
        for key, value in named.items():
            torch.testing.assert_close(found[name][key], value, rtol=1e-3, atol=1e-9)
        assert all(torch.equal(value, networks[name].state_dict()[key]) for key, value in before[name].items())


def test_importance_is_the_fisher_information_of_the_modulation(tmp_path: Path) -> None:
    """Of kernels whose modulation has not moved: (dL/dM)^2 by differentiating W (1 + M) at M = 0."""
    shares = {"adaptation.adam.probe": 0.125, "adaptation.adam.fisher": 0.125}
    recipe = recipe_of(tmp_path, {"adaptation.adam.rate": 1e-12, **shares})
    networks = start_of(recipe)
    adaptation = trained_on(recipe, networks)
    found, images = importance(networks, adaptation)
    assert images == 8
    g, d = networks["generator"], networks["discriminator"]
    expected = {name: torch.zeros_like(values) for name, values in found["generator"].items()}
    zs = draw_latents(1, "generator", 4, 4, 4)
    reals = (pictures(4) * 127.5 + 127.5).round() / 127.5 - 1
    for z, real in zip(zs, reals, strict=True):
        changes = {name: torch.zeros_like(weight_of(layer), requires_grad=True) for name, layer in layers_of(g).items()}
        weights = {f"{name}.weight": weight_of(layer) * (1 + changes[name]) for name, layer in layers_of(g).items()}
        loss = nn.functional.softplus(d(real[None]) - d(functional_call(g, weights, z[None]))).squeeze()
        for name, gradient in zip(changes, torch.autograd.grad(loss, list(changes.values())), strict=True):
            expected[name] += as_rows(gradient.square(), is_transposed(layers_of(g)[name])).mean(1) / 4
    for name, values in expected.items():
        torch.testing.assert_close(found["generator"][name], values, rtol=1e-3, atol=1e-12)


def test_the_kernels_above_the_quantile_of_their_network_are_important() -> None:
    kernels = {"generator": {"a": torch.tensor([1.0, 4.0]), "b": torch.tensor([2.0, 3.0])},
               "discriminator": {"c": torch.tensor([10.0, 20.0])}}
    found = above_quantile(kernels, 0.5)
    assert [values.tolist() for values in found["generator"].values()] == [[False, True], [False, True]]
    assert found["discriminator"]["c"].tolist() == [False, True]
    assert all(values.all() or name == "a" for name, values in above_quantile(kernels, 0.0)["generator"].items() if name != "b")


def chequered(networks: dict[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    return {name: {layer: torch.arange(len(as_rows(weight_of(module), is_transposed(module)))) % 2 == 0
                   for layer, module in layers_of(network).items()} for name, network in networks.items()}


@pytest.mark.parametrize("model", SMALL)
def test_modulation_changes_nothing_at_the_start(tmp_path: Path, model: str) -> None:
    recipe = recipe_of(tmp_path, model=model)
    networks, plain = start_of(recipe), start_of(recipe)
    modulate(networks, chequered(networks), recipe.adaptation.adam, 1)
    assert torch.equal(networks["generator"](latents(4, dim=4)), plain["generator"](latents(4, dim=4)))
    assert torch.equal(networks["discriminator"](pictures(4)), plain["discriminator"](pictures(4)))


def test_important_kernels_are_modulated_and_others_fine_tuned(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"adaptation.adam.rank": 2, "adaptation.adam.rate": 3.0})
    networks = start_of(recipe)
    important = chequered(networks)
    modulate(networks, important, recipe.adaptation.adam, 1)
    layer: Any = networks["generator"].get_submodule("blocks.0")
    modulated = layer.parametrizations.weight[0]
    torch.nn.init.normal_(modulated.up)
    original = as_rows(layer.parametrizations.weight.original, True)
    change = 1 + 3 * modulated.up @ modulated.down
    chosen = important["generator"]["blocks.0"][:, None]
    torch.testing.assert_close(as_rows(layer.weight, True), torch.where(chosen, original * change, original))
    layer.weight.square().sum().backward()
    moved = as_rows(layer.parametrizations.weight.original.grad, True).abs().sum(1) > 0
    assert torch.equal(moved, ~important["generator"]["blocks.0"])
    assert torch.equal(modulated.up.grad.abs().sum(1) > 0, important["generator"]["blocks.0"])


def test_a_trial_keeps_the_important_kernels_weights_bit_for_bit(run: Path) -> None:
    recipe = recipe_of(run.parent)
    trial = trial_of(run, recipe, "adam", domain="kept")
    row = run_trial(trial, recipe, run, until=32)
    assert row["images_seen"] == 32
    source = start_of(recipe)["generator"]
    weights = weights_of(run, trial, recipe)["generator"]
    shares = []
    for name, layer in layers_of(source).items():
        rows = as_rows(weights[f"{name}.parametrizations.weight.original"], is_transposed(layer))
        still = (rows == as_rows(weight_of(layer), is_transposed(layer))).all(1)
        important = weights[f"{name}.parametrizations.weight.0.important"]
        assert torch.equal(still, important)
        shares.append(important.float())
    assert torch.cat(shares).mean() == pytest.approx(0.5, abs=0.05)


def test_the_probing_counts_in_the_budget(run: Path) -> None:
    recipe = recipe_of(run.parent, {"adaptation.adam.probe": 0.25, "adaptation.adam.fisher": 0.25})
    row = run_trial(trial_of(run, recipe, "adam", domain="counted"), recipe, run, until=8)
    assert row["images_seen"] == 16
    recipe = recipe_of(run.parent, {"adaptation.lr": 1e30})
    row = run_trial(trial_of(run, recipe, "adam", domain="diverged"), recipe, run, until=32)
    assert row["status"] == "failed" and "not finite" in row["reason"]
