"""L2-SP against its closed form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.methods.start import SMALL, adaptation_of, batch_of, recipe_of, start_of
from training.methods import METHODS


@pytest.mark.parametrize("model", SMALL)
def test_it_is_the_summed_square_with_its_gradient_and_nothing_at_the_start(tmp_path: Path, model: str) -> None:
    weights = {"generator": 0.3, "discriminator": 0.7}
    recipe = recipe_of(tmp_path, {"adaptation.l2sp": weights}, model)
    networks = start_of(recipe)
    adaptation, batch = adaptation_of(recipe, networks), batch_of(recipe)
    plain, ours = adaptation.phases, METHODS["l2sp"].phases(adaptation)
    for before, after in zip(plain, ours, strict=True):
        name = before.network
        parameters = dict(networks[name].named_parameters())
        for shift in (0.0, 0.02):
            with torch.no_grad():
                for key, parameter in parameters.items():
                    parameter.copy_(dict(adaptation.source[name].named_parameters())[key] + shift)
            bare, terms = before.loss(networks, batch), after.loss(networks, batch)
            count = sum(p.numel() for p in parameters.values())
            assert terms["l2sp"].item() == pytest.approx(count * shift**2, rel=1e-4, abs=0)
            extra = terms["total"] - bare["total"]
            assert extra.item() == pytest.approx(weights[name] * count * shift**2, rel=1e-3, abs=1e-6)
            for key, gradient in zip(parameters, torch.autograd.grad(extra, list(parameters.values())), strict=True):
                # d/dtheta of weight (theta - theta_s)^2; the family's own gradient cancels to rounding.
                assert (gradient - 2 * weights[name] * shift).abs().max() < 2e-4, key
