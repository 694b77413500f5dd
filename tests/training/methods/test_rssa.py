"""RSSA: the two correlations against loops over places."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tests.training.methods.start import adaptation_of, batch_of, pictures, recipe_of, start_of
from tests.training.methods.test_cdc import EIGHT, anchored
from tests.training.models.make import stir
from training.methods import METHODS
from training.methods.features import block_outputs
from training.methods.rssa import disturbance_correlation, disturbed, places, self_correlation


def maps(seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, 2, 2, generator=draw), torch.randn(4, 5, 2, 3, generator=draw)]


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """(C, H, W) twice -> (H W, H W) by loops."""
    first, second = a.flatten(1).T, b.flatten(1).T
    return torch.stack([torch.stack([cosine_similarity(x, y, 0) for y in second]) for x in first])


def test_self_correlation_by_hand() -> None:
    target, source = maps(0), maps(1)
    expected = torch.tensor(0.0)
    for ours, theirs in zip(target, source, strict=True):
        pairs = zip(ours, theirs, strict=True)
        expected += torch.stack([(cosines(t, t) - cosines(s, s)).abs().mean() for t, s in pairs]).mean()
    torch.testing.assert_close(self_correlation(target, source), expected)


def test_disturbance_correlation_by_hand() -> None:
    target, source = maps(0), maps(1)
    expected = torch.tensor(0.0)
    for ours, theirs in zip(target, source, strict=True):
        found = []
        for i, j in ((0, 2), (1, 3)):  # groups of 2: entries 2 apart
            p_t, p_s = (cosines(x[i], x[j]).softmax(1) for x in (ours, theirs))
            found.append((p_t - p_s).abs().sum(1).mean())
        expected += torch.stack(found).mean()
    torch.testing.assert_close(disturbance_correlation(target, source, 2), expected)


def test_latents_are_disturbed_from_the_first_of_their_group() -> None:
    z = torch.randn(8, 3)
    moved = disturbed(z, 0.15, 4)
    for i in range(8):
        torch.testing.assert_close(moved[i], 0.15 * z[i] + 0.85 * z[i % 2])
    parts = [disturbed(z[i::2], 0.15, 4) for i in range(2)]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), moved)


def test_fine_maps_are_averaged_to_sixteen_places_a_side() -> None:
    fine = torch.randn(2, 3, 32, 32)
    expected = torch.nn.functional.normalize(torch.nn.functional.avg_pool2d(fine, 2), dim=1).flatten(2).mT
    torch.testing.assert_close(places(fine), expected)
    assert places(torch.randn(2, 3, 7, 7)).shape == (2, 49, 3)


def test_both_terms_and_their_gradients_are_zero_at_the_source(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, EIGHT)
    networks = start_of(recipe)
    adaptation = adaptation_of(recipe, networks)
    METHODS["rssa"].prepare(networks, adaptation)
    z = batch_of(recipe, pictures(8)).latents["generator"]
    for term in (self_correlation, lambda t, s: disturbance_correlation(t, s, 4)):
        source = [x.detach() for x in block_outputs(adaptation.source["generator"], z, None)]
        loss = term(block_outputs(networks["generator"], z, None), source)
        gradients = torch.autograd.grad(loss, list(networks["generator"].parameters()), allow_unused=True)
        assert loss.item() == 0
        assert max(float(g.abs().max()) for g in gradients if g is not None) == 0
    phase = METHODS["rssa"].phases(adaptation)[1]
    stir(networks["generator"], scale=0.2)
    terms = phase.loss(networks, anchored(recipe))
    ours, theirs = (block_outputs(network, z, None) for network in (networks["generator"], adaptation.source["generator"]))
    torch.testing.assert_close(terms["self_correlation"], self_correlation(ours, theirs).detach())
    near = disturbed(z, 0.15, 4)
    ours, theirs = (block_outputs(network, near, None) for network in (networks["generator"], adaptation.source["generator"]))
    torch.testing.assert_close(terms["disturbance_correlation"], disturbance_correlation(ours, theirs, 4).detach())
    torch.testing.assert_close(terms["total"].detach(), terms["adversarial"] + 0.8 * terms["self_correlation"]
                               + 0.4 * terms["disturbance_correlation"])
