"""Batch spectral shrinkage against singular values by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.methods.start import adaptation_of, batch_of, pictures, recipe_of, start_of
from training.methods import METHODS
from training.methods.bss import different, smallest_squares


@pytest.mark.parametrize("count", [1, 2, 3])
def test_it_is_the_sum_of_the_smallest_squares_with_their_gradient(count: int) -> None:
    """Of F = U S V^T: the value sum s^2, the gradient 2 s u v^T."""
    features = torch.randn(5, 9, dtype=torch.float32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = smallest_squares(features, count)
    u, s, vh = torch.linalg.svd(features.detach().double(), full_matrices=False)
    assert value.item() == pytest.approx(s[-count:].square().sum().item(), rel=1e-5)
    expected = sum(2 * s[-i] * u[:, -i, None] * vh[-i] for i in range(1, count + 1))
    torch.testing.assert_close(torch.autograd.grad(value, features)[0].double(), expected, rtol=1e-3, atol=1e-4)


def test_more_values_than_there_are_mean_all() -> None:
    features = torch.randn(3, 7)
    assert smallest_squares(features, 99).item() == pytest.approx(features.square().sum().item(), rel=1e-5)


def test_repeated_images_are_left_out() -> None:
    """Where the batch holds an image twice, the smallest singular value of all rows is 0 and shrinks nothing."""
    images = pictures(3)
    assert different(images[[2, 0, 2, 1, 0]]).sort().values.tolist() == [0, 1, 3]


def test_the_discriminators_loss_has_it_on_the_different_images_of_the_batch(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"adaptation.bss": {"weight": 0.5, "values": 2}})
    networks = start_of(recipe)
    adaptation, batch = adaptation_of(recipe, networks), batch_of(recipe, pictures(3)[[0, 1, 2, 0]])
    (before, g_before), (after, g_after) = adaptation.phases, METHODS["bss"].phases(adaptation)
    assert g_before is g_after
    terms, bare = after.loss(networks, batch), before.loss(networks, batch)
    with torch.no_grad():
        features = networks["discriminator"].features(pictures(3))  # type: ignore[operator]  # Module.__getattr__ is untyped
    expected = torch.linalg.svd(features.double()).S[-2:].square().sum().item()
    assert expected > 1e-3
    assert terms["bss"].item() == pytest.approx(expected, rel=1e-4)
    assert (terms["total"] - bare["total"]).item() == pytest.approx(0.5 * expected, rel=1e-3)
