"""LoRA: no change at the start, a change of low rank after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.methods.start import SMALL, adaptation_of, recipe_of, start_of
from tests.training.models.make import latents, stir
from training.methods.kernels import as_rows, is_transposed, layers_of, weight_of
from training.methods.lora import add_adapters


@pytest.mark.parametrize("model", SMALL)
def test_adapters_change_nothing_at_the_start_and_by_their_rank_later(tmp_path: Path, model: str) -> None:
    recipe = recipe_of(tmp_path, {"adaptation.lora.rank": 2}, model)
    networks, plain = start_of(recipe), start_of(recipe)["generator"]
    generator = networks["generator"]
    add_adapters(networks, adaptation_of(recipe, networks))
    assert torch.equal(generator(latents(4, dim=4)), plain(latents(4, dim=4)))
    assert all(p.requires_grad is name.endswith((".up", ".down")) for name, p in generator.named_parameters())
    for name in layers_of(generator):
        stir(generator.get_submodule(f"{name}.parametrizations.weight.0"), scale=0.5)
    for ours, theirs in zip(layers_of(generator).values(), layers_of(plain).values(), strict=True):
        change = as_rows(weight_of(ours).detach() - weight_of(theirs), is_transposed(ours))
        values = torch.linalg.svdvals(change.double())
        rank = min(2, *change.shape)
        assert values[rank - 1] > 1e-3
        assert values[rank:].sum() < 1e-4 * values[0]


def test_the_change_is_scale_b_a(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"adaptation.lora.scale": 3.0})
    networks, plain = start_of(recipe), start_of(recipe)["generator"]
    add_adapters(networks, adaptation_of(recipe, networks))
    ours, theirs = (layers_of(network)["project"] for network in (networks["generator"], plain))
    adapter: Any = ours.get_submodule("parametrizations.weight.0")
    torch.nn.init.ones_(adapter.up)
    torch.testing.assert_close(weight_of(ours), weight_of(theirs) + 3 * adapter.down.sum(0))
