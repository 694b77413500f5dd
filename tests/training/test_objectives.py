"""Losses against closed forms on fixed logits; penalties against gradients written by hand and by finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor, nn

from data_shards.errors import UserError
from training.objectives import OBJECTIVES, PENALTIES, ObjectiveConfig
from training.objectives.packing import check_packing, pack
from training.objectives.penalties import between, squared_gradient_norms
from training.world import World

REAL, FAKE = np.array([1.5, -0.5, 0.0, 4.0]), np.array([0.25, 2.0, -3.0, 0.5])
Logits = NDArray[np.float64]


def sigmoid(t: Logits) -> Logits:
    return 1 / (1 + np.exp(-t))


# The papers' equations as they stand there, in probabilities where the paper has probabilities.
CLOSED_FORMS: dict[str, tuple[Callable[[Logits, Logits], Any], Callable[[Logits, Logits], Any]]] = {
    "relativistic": (lambda r, f: np.mean(np.log(1 + np.exp(f - r))), lambda r, f: np.mean(np.log(1 + np.exp(r - f)))),
    "minimax": (lambda r, f: -np.mean(np.log(sigmoid(r))) - np.mean(np.log(1 - sigmoid(f))),
                lambda r, f: np.mean(np.log(1 - sigmoid(f)))),
    "non_saturating": (lambda r, f: -np.mean(np.log(sigmoid(r))) - np.mean(np.log(1 - sigmoid(f))),
                       lambda r, f: -np.mean(np.log(sigmoid(f)))),
    "least_squares": (lambda r, f: 0.5 * np.mean((r - 1) ** 2) + 0.5 * np.mean(f**2), lambda r, f: 0.5 * np.mean((f - 1) ** 2)),
    "wasserstein": (lambda r, f: np.mean(f) - np.mean(r), lambda r, f: -np.mean(f)),
    "hinge": (lambda r, f: np.mean(np.maximum(0, 1 - r)) + np.mean(np.maximum(0, 1 + f)), lambda r, f: -np.mean(f)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_both_losses_are_the_closed_form(name: str) -> None:
    objective, (discriminator, generator) = OBJECTIVES[name], CLOSED_FORMS[name]
    real, fake = torch.from_numpy(REAL), torch.from_numpy(FAKE)
    assert float(objective.discriminator(real, fake)) == pytest.approx(discriminator(REAL, FAKE), rel=1e-12)
    assert float(objective.generator(real, fake)) == pytest.approx(generator(REAL, FAKE), rel=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_a_paired_generator_s_loss_depends_on_the_real_logits(name: str) -> None:
    real = torch.from_numpy(REAL).requires_grad_(True)
    loss = OBJECTIVES[name].generator(real, torch.from_numpy(FAKE))
    assert loss.requires_grad == OBJECTIVES[name].paired


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_overflow_where_the_discriminator_is_sure(name: str) -> None:
    real, fake = torch.tensor([200.0, -200.0]), torch.tensor([-300.0, 300.0])
    for loss in OBJECTIVES[name][:2]:
        assert bool(torch.isfinite(loss(real, fake)))


@pytest.mark.parametrize("name", [name for name, objective in OBJECTIVES.items() if objective.margin])
def test_the_margin_is_zero_where_d_is_undecided(name: str) -> None:
    """At a margin of 0 each of D's own decision rules is on its threshold; above it, D takes the sample for real."""
    margin = OBJECTIVES[name].margin
    assert margin is not None
    threshold = {"relativistic": FAKE, "least_squares": np.full(4, 0.5)}.get(name, np.zeros(4))
    assert margin(torch.from_numpy(REAL), torch.from_numpy(FAKE)).sign().tolist() == np.sign(REAL - threshold).tolist()


# Penalties. D(x) = w.x + (v.x)^2 has the gradient g = w + 2 (v.x) v in x, and |g|^2 the gradient 4 [(v.x) g + (g.v) x] in v.
W = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64)
V = torch.tensor([0.2, 0.4, -0.7], dtype=torch.float64)
X = torch.tensor([[1.0, 2.0, 3.0], [-0.5, 0.1, 0.9]], dtype=torch.float64)
# d value / d |g|^2 by hand, as a function of the norm |g|.
SLOPES: dict[str, Callable[[float], float]] = {
    "r1": lambda g: 0.5, "r2": lambda g: 0.5, "gp0": lambda g: 1.0, "gp1": lambda g: 1 - 1 / g}
VALUES: dict[str, Callable[[float], float]] = {
    "r1": lambda g: g**2 / 2, "r2": lambda g: g**2 / 2, "gp0": lambda g: g**2, "gp1": lambda g: (g - 1) ** 2}


@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_and_its_gradient_by_hand(name: str) -> None:
    v, x = V.clone().requires_grad_(True), X.clone().requires_grad_(True)
    penalty = PENALTIES[name].value(squared_gradient_norms(x @ W + (x @ v) ** 2, x))
    gradients = [W + 2 * (row @ V) * V for row in X]
    assert penalty.tolist() == pytest.approx([VALUES[name](float(g.norm())) for g in gradients], rel=1e-12)
    (found,) = torch.autograd.grad(penalty.mean(), v)
    expected = sum(SLOPES[name](float(g.norm())) * 4 * ((row @ V) * g + (g @ V) * row)
                   for row, g in zip(X, gradients, strict=True)) / 2
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_s_gradient_is_that_of_finite_differences(name: str) -> None:
    """Through a small convolutional network in float64, in every weight of its first layer."""
    torch.manual_seed(0)
    first = nn.Conv2d(2, 3, 3)
    network = nn.Sequential(first, nn.Softplus(), nn.Flatten(), nn.Linear(12, 1, bias=False)).double()
    images = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    weight = first.weight

    def value() -> Tensor:
        x = images.clone().requires_grad_(True)
        return PENALTIES[name].value(squared_gradient_norms(network(x).squeeze(1), x)).mean()

    (found,) = torch.autograd.grad(value(), weight)
    expected, h = torch.zeros_like(weight), 1e-6
    for index in np.ndindex(*weight.shape):
        values = []
        for step in (h, -h):
            with torch.no_grad():
                weight[index] += step
            values.append(float(value().detach()))
            with torch.no_grad():
                weight[index] -= step
        expected[index] = (values[0] - values[1]) / (2 * h)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_penalty_norm_is_per_sample() -> None:
    """Over all of a sample's values: not over its channels alone, and not over the batch."""
    x = torch.randn(4, 2, 3, 3, requires_grad=True)
    weights = torch.arange(4.0)[:, None, None, None]
    assert squared_gradient_norms((weights * x).sum((1, 2, 3)), x).tolist() == pytest.approx([0, 18, 72, 162])


def test_one_centred_penalty_of_a_flat_discriminator_has_a_finite_gradient() -> None:
    weight, x = torch.zeros(3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    penalty = PENALTIES["gp1"].value(squared_gradient_norms(x @ weight, x)).mean()
    assert float(penalty.detach()) == pytest.approx(1) and torch.autograd.grad(penalty, weight)[0].tolist() == [0, 0, 0]


def test_norms_keep_float64_and_leave_bf16() -> None:
    for given, kept in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        x = torch.ones(2, 3, dtype=given, requires_grad=True)
        assert squared_gradient_norms((x * x).sum(1), x).dtype == kept


def test_points_between_lie_on_each_pair_s_line() -> None:
    real, fake = torch.ones(3, 2, 2, 2), torch.zeros(3, 2, 2, 2)
    found = between(real, fake, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(found, torch.tensor([0.0, 0.25, 1.0])[:, None, None, None].expand(3, 2, 2, 2))


# Packing.


def test_packs_are_samples_side_by_side_on_the_channels() -> None:
    images = torch.arange(4.0)[:, None, None, None] + torch.tensor([0.0, 0.5])[None, :, None, None].expand(4, 2, 3, 3)
    packed = pack(images, 2)
    assert packed.shape == (2, 4, 3, 3)
    assert packed[:, :, 0, 0].tolist() == [[0.0, 0.5, 2.0, 2.5], [1.0, 1.5, 3.0, 3.5]]
    assert torch.equal(pack(images, 1), images)


@pytest.mark.parametrize("m", [2, 3])
def test_packs_are_the_same_at_every_world_size(m: int) -> None:
    images = torch.randn(12, 1, 2, 2)
    whole = {tuple(one.flatten().tolist()) for one in pack(images, m)}
    for size in (2, 4 if m == 3 else 3):
        shares = [pack(World(rank, size).slice(images), m) for rank in range(size)]
        assert {tuple(one.flatten().tolist()) for share in shares for one in share} == whole


def test_a_batch_that_does_not_fall_into_packs_is_refused() -> None:
    check_packing("training.batch", 24, 4, 3)
    with pytest.raises(UserError, match=r"batch = 20 does not fall into packs of 3 .* its 2 equal parts .*; use 18 or 24"):
        check_packing("training.batch", 20, 2, 3)
    with pytest.raises(UserError, match="use 8\\."):
        check_packing("training.batch", 4, 2, 4)


@pytest.mark.parametrize(("fields", "words"), [
    ({"loss": "lsgan"}, "least_squares, wasserstein"), ({"gp1": -1.0}, "not negative"),
    ({"pack": 0}, "greater than or equal to 1")])
def test_wrong_objectives_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ObjectiveConfig.model_validate(fields)
