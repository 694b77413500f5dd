"""The projected discriminator: a trunk that never changes, heads at every scale."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import conv2d, leaky_relu

from tests.training.methods.start import SMALL, adaptation_of, pictures, recipe_of, start_of, trial_of, weights_of
from training.methods import METHODS
from training.methods.projected import ProjectedDiscriminator
from training.trial import run_trial


def test_the_trunk_stays_bit_for_bit_and_the_heads_and_the_generator_move(run: Path) -> None:
    recipe = recipe_of(run.parent, {"training.discriminator.spectral_norm": True})
    trial = trial_of(run, recipe, "projected", seed=4)
    run_trial(trial, recipe, run, until=16)
    start, ours = start_of(recipe), weights_of(run, trial, recipe)
    for name, value in start["discriminator"].state_dict().items():
        assert torch.equal(ours["discriminator"][f"trunk.{name}"], value), name
    heads = {name for name in ours["discriminator"] if name.startswith("heads.")}
    assert heads == {f"heads.{i}.{name}" for i in range(2) for name in ("layer.weight", "layer.bias", "head.weight")}
    assert not torch.equal(ours["generator"]["project.weight"], start["generator"].state_dict()["project.weight"])
    networks = start_of(recipe)
    METHODS["projected"].prepare(networks, adaptation_of(recipe, networks))
    assert not torch.equal(ours["discriminator"]["heads.0.layer.weight"], networks["discriminator"].state_dict()[
        "heads.0.layer.weight"])


def test_its_logits_by_hand(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    networks = start_of(recipe)
    source, images = start_of(recipe)["discriminator"], pictures(3)
    METHODS["projected"].prepare(networks, adaptation_of(recipe, networks))
    projected = networks["discriminator"]
    w = projected.state_dict()
    with torch.no_grad():
        first = source.blocks[0](images)  # type: ignore[index,operator]  # Module.__getattr__ is untyped
        places = leaky_relu(conv2d(leaky_relu(first, 0.2), w["heads.0.layer.weight"], w["heads.0.layer.bias"], padding=1), 0.2)
        patches = torch.einsum("nchw,c->nhw", places, w["heads.0.head.weight"][0])  # a logit for each place
        seen = source.features(images)  # type: ignore[operator]
        whole = leaky_relu(seen @ w["heads.1.layer.weight"].T + w["heads.1.layer.bias"], 0.2) @ w["heads.1.head.weight"][0]
        expected = (patches.mean((1, 2)) + whole) / 2
        torch.testing.assert_close(projected(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", SMALL)
def test_heads_are_those_of_the_seed_and_every_scale_counts(tmp_path: Path, model: str) -> None:
    recipe = recipe_of(tmp_path, model=model)
    first, second = start_of(recipe), start_of(recipe)
    for networks in (first, second):
        torch.rand(3)  # heads do not depend on what else was drawn
        METHODS["projected"].prepare(networks, adaptation_of(recipe, networks))
    a, b = first["discriminator"], second["discriminator"]
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert isinstance(a, ProjectedDiscriminator)
    assert len(a.heads) == len(a.trunk.blocks) > 1  # type: ignore[arg-type]
    images = pictures(2)
    before = a(images)
    for head in a.heads:
        with torch.no_grad():
            head.head.weight.mul_(2)  # type: ignore[operator,union-attr]
        after = a(images)
        assert not torch.equal(before, after)
        before = after
    assert a.taps(images) and not any(block._forward_hooks for block in a.trunk.blocks)  # type: ignore[union-attr]
