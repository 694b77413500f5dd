"""What all rules share: the inner loop, and which weights it adapts."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from data_shards import UserError, batches
from tests.toy import toy_set
from tests.training.meta.points import ONE_NETWORK, Point, images, inner_loop
from tests.training.models.make import LATENT, small_gan
from training.augment import NO_AUGMENTATION
from training.families import gan_phases
from training.meta.rule import adapt, chosen
from training.recipe import TrainingConfig


def test_patterns_choose_weights_by_network_and_name() -> None:
    networks = dict(zip(("generator", "discriminator"), small_gan("dcgan"), strict=True))
    everything = {name: [key for key, _ in network.named_parameters()] for name, network in networks.items()}
    assert chosen(networks, ["*"]) == everything
    some = chosen(networks, ["generator.blocks.*", "*.head.weight"])
    assert some["discriminator"] == ["head.weight"]
    assert some["generator"] == [key for key in everything["generator"] if key.startswith("blocks.") or key == "head.weight"]
    with pytest.raises(UserError, match=r"meta\.inner_parts has 'generator\.head2', which matches no weight; they are called "
                                        r"generator\.project\.weight, .* to discriminator\."):
        chosen(networks, ["*", "generator.head2"])


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("parts", [["discriminator.head.*"], ["generator.*"],
                                   ["generator.blocks.0.*", "discriminator.blocks.*"]])
def test_weights_that_are_left_out_keep_their_bits_in_the_inner_loop(tmp_path_factory: pytest.TempPathFactory, optimizer: str,
                                                                    parts: list[str]) -> None:
    """A network that nothing of is adapted takes no step, and is there for the others."""
    given = next(batches(toy_set(tmp_path_factory.mktemp("root") / "source"), batch=4, seed=1, streams=1))
    networks = dict(zip(("generator", "discriminator"), small_gan("dcgan"), strict=True))
    before = copy.deepcopy({name: network.state_dict() for name, network in networks.items()})
    inner = inner_loop(networks, gan_phases("relativistic"), given, given, steps=3, lr=1e-2, optimizer=optimizer, parts=parts,
                       latent_dim=LATENT, weights={"r1": 1.0})
    adapted = chosen(networks, parts)
    metrics = adapt(inner)
    for name, network in networks.items():
        assert all(p.requires_grad and p.grad is None for p in network.parameters()), "as it was before"
        assert (f"{name}/adversarial" in metrics) is bool(adapted[name])
        for key, value in network.state_dict().items():
            assert torch.equal(value, before[name][key]) is (key not in adapted[name]), (name, key)


def test_inner_optimizers_begin_afresh() -> None:
    """A second task from the same weights ends with the same bits: no moment is left of the first."""
    phases = ONE_NETWORK.phases(TrainingConfig(images=1), NO_AUGMENTATION)
    ends = []
    for gray in (204, 30, 204):
        point = Point()
        adapt(inner_loop({"generator": point}, phases, images(gray), images(0), steps=3, lr=0.1, optimizer="adam"))
        ends.append((point.body.item(), point.head.item()))
    assert ends[0] == ends[2] != ends[1]
    assert all(a != b for a, b in itertools.pairwise(ends))
