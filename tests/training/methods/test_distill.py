"""Feature distillation: nothing at the start, the mean squared difference afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.methods.start import SMALL, adaptation_of, batch_of, recipe_of, start_of
from training.methods import METHODS


@pytest.mark.parametrize("model", SMALL)
def test_it_is_zero_at_the_start_and_the_mean_squared_difference_afterwards(tmp_path: Path, model: str) -> None:
    recipe = recipe_of(tmp_path, {"adaptation.distill.weight": 0.5}, model)
    networks = start_of(recipe)
    adaptation, batch = adaptation_of(recipe, networks), batch_of(recipe)
    (before, g_before), (after, g_after) = adaptation.phases, METHODS["distill"].phases(adaptation)
    assert g_before is g_after
    target, source = networks["discriminator"], adaptation.source["discriminator"]
    parameters = [p for name, p in target.named_parameters() if not name.startswith("head")]
    terms, bare = after.loss(networks, batch), before.loss(networks, batch)
    assert terms["distill"] == 0 and terms["total"] == bare["total"]
    ours, plain = (torch.autograd.grad(found["total"], parameters) for found in (terms, bare))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))

    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1.2)
    terms, bare = after.loss(networks, batch), before.loss(networks, batch)
    wanted = torch.nn.functional.mse_loss(target.features(batch.images), source.features(batch.images))  # type: ignore[operator]
    assert wanted > 1e-6
    assert terms["distill"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert (terms["total"] - bare["total"]).item() == pytest.approx(0.5 * wanted.item(), rel=1e-3, abs=1e-6)
    gradients = torch.autograd.grad(terms["total"] - bare["total"], parameters)
    expected = torch.autograd.grad(0.5 * wanted, parameters)
    for ours_, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-2, atol=1e-5 + 1e-4 * float(theirs.abs().max()))
