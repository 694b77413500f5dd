"""The GAN family's phases: any objective with any penalty, packing and augmentation, however the batch is split."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import training.families.gan as gan
from data_shards import Batch as Images
from data_shards.errors import UserError
from tests.toy import toy_recipe
from training.augment import NO_AUGMENTATION, AugmentConfig
from training.config import apply_overrides
from training.draws import latents, uniforms
from training.engines import EngineConfig, make_engine
from training.families import Batch, Phase, gan_phases
from training.loop import Plan, State, train
from training.models.config import DiscriminatorConfig, GeneratorConfig
from training.networks import make_networks
from training.objectives import OBJECTIVES, PENALTIES, ObjectiveConfig
from training.objectives.packing import pack
from training.optimizers import OptimizerConfig
from training.recipe import TrainingConfig, TrainingRecipe, resolve
from training.world import World

N, SHAPE, SEED, AT = 24, (3, 16, 16), 5, 480
IMAGES = torch.rand(N, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def networks(packed: int = 1) -> dict[str, nn.Module]:
    config = TrainingConfig(generator=GeneratorConfig(channels=4, latent_dim=3), discriminator=DiscriminatorConfig(channels=4),
                            objective=ObjectiveConfig(pack=packed), images=N, batch=N)
    return make_networks(config, SHAPE, SEED)


def batch(phases: list[Phase], weights: dict[str, float], world: World | None = None) -> Batch:
    world = world or World()
    return Batch(
        world.slice(IMAGES), torch.full((N // world.size,), -1),
        {phase.network: latents(SEED, phase.network, AT, N, 3, world) for phase in phases}, weights,
        {f"{phase.network} {purpose}": uniforms(SEED, f"{phase.network} {purpose}", AT, N, count, world)
         for phase in phases for purpose, count in phase.uniforms.items() if count})


def gradients(phase: Phase, found: dict[str, nn.Module], given: Batch) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The terms of a phase, and the gradient of its total in each of its network's weights."""
    terms = phase.loss(found, given)
    return terms, list(torch.autograd.grad(terms["total"], list(found[phase.network].parameters())))


@pytest.mark.parametrize("loss", OBJECTIVES)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_any_objective_with_any_penalty_is_the_sum_by_hand(loss: str, penalty: str) -> None:
    found, phases = networks(), gan_phases(loss)
    given, weight = batch(phases, {penalty: 0.3}), 0.3
    d = found["discriminator"]
    terms, ours = gradients(phases[0], found, given)
    fake = found["generator"](given.latents["discriminator"]).detach()
    share = given.uniforms["discriminator between"][:, 0].float()[:, None, None, None]
    points = {"real": IMAGES, "fake": fake, "between": share * IMAGES + (1 - share) * fake}
    x = points[PENALTIES[penalty].at].clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(d(x).sum(), x, create_graph=True)
    norm = slope.flatten(1).norm(dim=1)
    value = {"r1": norm**2 / 2, "r2": norm**2 / 2, "gp0": norm**2, "gp1": (norm - 1) ** 2}[penalty].mean()
    total = OBJECTIVES[loss].discriminator(d(IMAGES), d(fake)) + weight * value
    assert terms[penalty].item() == pytest.approx(value.item(), rel=1e-4)
    for one, other in zip(ours, torch.autograd.grad(total, list(d.parameters())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    fake = found["generator"](given.latents["generator"])
    by_hand = OBJECTIVES[loss].generator(d(IMAGES).detach(), d(fake))
    assert phases[1].loss(found, given)["total"].item() == pytest.approx(by_hand.item(), rel=1e-4)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_finite_differences_give_the_same_gradient(penalty: str) -> None:
    """What ZeRO 3 takes: the networks are piecewise linear, so the difference is exact but for rounding."""
    found = networks()
    results = []
    for exact in (True, False):
        phases = gan_phases("relativistic", exact=exact)
        results.append(gradients(phases[0], found, batch(phases, {penalty: 1.0})))
    (terms, first), (others, second) = results
    assert terms[penalty].item() == pytest.approx(others[penalty].item(), rel=1e-4)
    joined = [torch.cat([g.flatten() for g in gradient]) for gradient in (first, second)]
    assert (joined[0] - joined[1]).norm() <= 2e-3 * joined[0].norm()


def test_what_has_no_weight_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> Tensor:
        raise AssertionError("a penalty was computed")

    monkeypatch.setattr(gan, "squared_gradient_norms", never)
    monkeypatch.setattr(gan, "between", never)
    phases = gan_phases("hinge")
    terms = phases[0].loss(networks(), batch(phases, {"r1": 0.0, "gp1": 0.0}))
    assert not terms.keys() & PENALTIES.keys()
    with pytest.raises(AssertionError):
        phases[0].loss(networks(), batch(phases, {"r1": 0.1}))


SETTINGS = [("relativistic", 1, AugmentConfig(kind="ada")), ("wasserstein", 2, NO_AUGMENTATION),
            ("hinge", 3, AugmentConfig(kind="diffaugment"))]


@pytest.mark.parametrize(("loss", "packed", "augmentation"), SETTINGS)
@pytest.mark.parametrize("network", [0, 1])
def test_however_a_batch_is_split_the_gradient_is_the_same(loss: str, packed: int, augmentation: AugmentConfig,
                                                           network: int) -> None:
    """Over two ranks, and each rank's share over two micro-batches: same packs, same augmentation, same points between."""
    found, phases = networks(packed), gan_phases(loss, packed=packed, augmentation=augmentation)
    weights = {"r1": 0.1, "gp1": 0.2, "augment": 0.8}
    _, whole = gradients(phases[network], found, batch(phases, weights))
    parts = [part for rank in range(2) for part in batch(phases, weights, World(rank, 2)).parts(2)]
    split = [gradients(phases[network], found, part)[1] for part in parts]
    for i, gradient in enumerate(whole):
        torch.testing.assert_close(torch.stack([one[i] for one in split]).mean(0), gradient, rtol=1e-3, atol=1e-5)


def test_the_discriminator_sees_packs_of_both_kinds_apart() -> None:
    found, phases = networks(2), gan_phases("hinge", packed=2)
    given, d = batch(phases, {}), networks(2)["discriminator"]
    terms = phases[0].loss(found, given)
    fake = found["generator"](given.latents["discriminator"])
    assert terms["real_logit"].item() == pytest.approx(d(pack(IMAGES, 2)).mean().item(), rel=1e-4, abs=1e-6)
    assert terms["fake_logit"].item() == pytest.approx(d(pack(fake, 2)).mean().item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("network", [0, 1])
def test_no_augmentation_at_p_zero_bit_for_bit(network: int) -> None:
    plain, phases = gan_phases("relativistic"), gan_phases("relativistic", augmentation=AugmentConfig(kind="ada"))
    found = networks()
    first, second, third = (gradients(given[network], found, batch(given, {"r1": 1.0, "augment": p}))[1]
                            for given, p in ((plain, 0.0), (phases, 0.0), (phases, 0.5)))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(first, third, strict=True))


def test_generator_s_gradient_passes_through_the_augmentation() -> None:
    for kind in ("ada", "diffaugment"):
        phases = gan_phases("non_saturating", augmentation=AugmentConfig(kind=kind))
        _, gradient = gradients(phases[1], networks(), batch(phases, {"augment": 1.0}))
        assert all(bool(torch.isfinite(one).all()) and float(one.abs().max()) > 0 for one in gradient)


# ADA in the loop.


def few_images() -> Iterator[Images]:
    """The same four images for ever: what a discriminator learns by heart."""
    images = (torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 255).to(torch.uint8)
    none = torch.full((4,), -1)
    while True:
        yield Images(images, none, none, np.array([b"x"] * 4), 0)


def adaptive_run(until: int, state: State | None = None, *, target: float = 0.3) -> State:
    config = AugmentConfig(kind="ada", p="adaptive", target=target, speed_images=400)
    if state is None:
        found = networks()
        state = State({name: make_engine(name, network, OptimizerConfig(lr=2e-3), EngineConfig(kind="torch"), World(), batch=4)
                       for name, network in found.items()}, {})
    plan = Plan(until=until, batch=4, seed=1, latent_dim=3, lr={"generator": 1e-5, "discriminator": 2e-3}, weights={},
                ema_halflife_images=0.0, augmentation=config)
    return train(state, gan_phases("non_saturating", augmentation=config), few_images(), plan)


def test_p_rises_while_the_discriminator_overfits_and_goes_on_after_a_break() -> None:
    state = adaptive_run(240)
    assert 0.3 < state.strength.p <= 0.8
    first = adaptive_run(120)
    again = State(first.engines, {}, images=first.images, strength=copy.copy(first.strength))
    assert adaptive_run(240, again).strength == state.strength


def test_p_stays_at_zero_for_a_discriminator_below_the_target() -> None:
    assert adaptive_run(80, target=1.0).strength.p == 0.0  # a mean sign of 1 is not over 1


# Recipes.


@pytest.mark.parametrize(("key", "value", "words"), [
    ("training.objective.pack", 3, "training.batch = 8 does not fall into packs of 3"),
    ("adaptation.batch", 5, "adaptation.batch = 5 does not fall into packs of 2"),
    ("meta.inner_batch", 5, "meta.inner_batch = 5 does not fall into packs of 2"),
    ("training.augmentation", {"kind": "ada", "p": "adaptive"}, r"training.augmentation.p = adaptive .* wasserstein"),
    ("adaptation.augmentation", {"kind": "ada", "p": "adaptive"}, r"adaptation.augmentation.p = adaptive .* wasserstein")])
def test_what_cannot_work_is_refused_when_the_recipe_is_read(tmp_path: Path, key: str, value: object, words: str) -> None:
    tree = toy_recipe(tmp_path, objective={"loss": "wasserstein", "pack": 2}).model_dump(mode="json")
    with pytest.raises(UserError, match=words):
        resolve(TrainingRecipe, apply_overrides(tree, {key: value}), where="test")
