"""Losses against closed forms on fixed logits; penalties against a gradient written by hand."""

from __future__ import annotations

import math

import pytest
import torch

from training.objectives import OBJECTIVES
from training.objectives.penalties import squared_gradient_norms

REAL, FAKE = torch.tensor([1.5, -0.5]), torch.tensor([0.25, 2.0])


def log1p_exp(x: float) -> float:
    return math.log1p(math.exp(x))


CLOSED_FORMS = {
    "relativistic": ((log1p_exp(0.25 - 1.5) + log1p_exp(2.0 + 0.5)) / 2, (log1p_exp(1.5 - 0.25) + log1p_exp(-0.5 - 2.0)) / 2),
    "non_saturating": ((log1p_exp(0.25) + log1p_exp(2.0) + log1p_exp(-1.5) + log1p_exp(0.5)) / 2,
                       (log1p_exp(-0.25) + log1p_exp(-2.0)) / 2),
    "hinge": ((0.0 + 1.5 + 1.25 + 3.0) / 2, -1.125),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_both_losses_are_the_closed_form(name: str) -> None:
    objective = OBJECTIVES[name]
    discriminator, generator = CLOSED_FORMS[name]
    assert float(objective.discriminator(REAL, FAKE)) == pytest.approx(discriminator, rel=1e-6)
    assert float(objective.generator(REAL, FAKE)) == pytest.approx(generator, rel=1e-6)


def test_penalty_and_its_gradient_by_hand() -> None:
    """D(x) = w.x + (v.x)^2: grad_x D = w + 2 (v.x) v, so |grad|^2 and its gradient in v are known."""
    w, v = torch.tensor([0.3, -1.0, 0.5]), torch.tensor([0.2, 0.4, -0.7], requires_grad=True)
    x = torch.tensor([[1.0, 2.0, 3.0], [-0.5, 0.1, 0.9]], requires_grad=True)
    norms = squared_gradient_norms(x @ w + (x @ v) ** 2, x)
    by_hand = torch.stack([(w + 2 * (row @ v) * v).square().sum() for row in x.detach()])
    torch.testing.assert_close(norms, by_hand)
    (gradient,) = torch.autograd.grad(norms.sum(), v)
    # d/dv |w + 2 (v.x) v|^2 = 4 [(v.x) g + (g.v) x] with g = w + 2 (v.x) v
    expected = torch.zeros(3)
    for row in x.detach():
        g = (w + 2 * (row @ v) * v).detach()
        expected += 4 * ((row @ v).detach() * g + (g @ v.detach()) * row)
    torch.testing.assert_close(gradient, expected)


def test_penalty_norm_is_per_sample() -> None:
    x = torch.randn(4, 2, 3, 3, requires_grad=True)
    weights = torch.arange(4.0)[:, None, None, None]
    assert squared_gradient_norms((weights * x).sum((1, 2, 3)), x).tolist() == pytest.approx([0, 18, 72, 162])
