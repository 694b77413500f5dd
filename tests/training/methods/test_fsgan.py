"""FSGAN: singular vectors stay, singular values move."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_shards import UserError
from tests.training.methods.start import SMALL, adaptation_of, pictures, recipe_of, start_of
from tests.training.models.make import latents
from training.methods.fsgan import train_singular_values
from training.methods.kernels import as_rows, is_transposed, layers_of, weight_of


@pytest.mark.parametrize("model", SMALL)
def test_the_start_is_the_source_bit_for_bit(tmp_path: Path, model: str) -> None:
    recipe = recipe_of(tmp_path, model=model)
    networks, plain = start_of(recipe), start_of(recipe)
    train_singular_values(networks, adaptation_of(recipe, networks))
    for name, network in networks.items():
        for ours, theirs in zip(layers_of(network).values(), layers_of(plain[name]).values(), strict=True):
            assert torch.equal(weight_of(ours), weight_of(theirs))
    assert torch.equal(networks["generator"](latents(4, dim=4)), plain["generator"](latents(4, dim=4)))
    assert torch.equal(networks["discriminator"](pictures(4)), plain["discriminator"](pictures(4)))


def test_what_trains_is_the_singular_values(tmp_path: Path) -> None:
    """W is U diag(s + rate c) V^T for numpy's U, s, V, whatever the changes c; and their number is what trains."""
    recipe = recipe_of(tmp_path, {"adaptation.fsgan.rate": 3.0})
    networks, plain = start_of(recipe), start_of(recipe)
    train_singular_values(networks, adaptation_of(recipe, networks))
    for name, network in networks.items():
        assert all(p.requires_grad is key.endswith(".change") for key, p in network.named_parameters())
        for ours, theirs in zip(layers_of(network).values(), layers_of(plain[name]).values(), strict=True):
            change = ours.parametrizations.weight[0].change  # type: ignore[union-attr, index]
            torch.nn.init.uniform_(change, -0.1, 0.1)
            rows = as_rows(weight_of(theirs), is_transposed(theirs)).detach().double()
            u, s, vh = torch.linalg.svd(rows, full_matrices=False)
            expected = u @ torch.diag(s + 3 * change.detach().double()) @ vh
            torch.testing.assert_close(as_rows(weight_of(ours), is_transposed(ours)).double(), expected, rtol=0, atol=2e-6)


def test_spectral_normalisation_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"training.discriminator.spectral_norm": True})
    networks = start_of(recipe)
    with pytest.raises(UserError, match=r"training\.discriminator\.spectral_norm has given them another"):
        train_singular_values(networks, adaptation_of(recipe, networks))
