"""Bounds and likelihoods of latent-variable models, against torch.distributions and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Laplace, MultivariateNormal, Normal, kl_divergence

from training.objectives.variational import (
    BOUNDS,
    LIKELIHOODS,
    Posterior,
    gaussian_kl,
    importance_bound,
    log_prior_over_posterior,
    sample_posterior,
    standard_normals,
)

K, N, D = 4, 5, 3


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def posterior() -> Posterior:
    return Posterior(draw(N, D, seed=1), draw(N, D, seed=2))


def as_distribution(given: Posterior) -> Normal:
    return Normal(given.mean, (given.log_variance / 2).exp())


def test_the_divergence_is_torch_distributions_own() -> None:
    expected = kl_divergence(as_distribution(posterior()), Normal(torch.zeros(N, D).double(), 1.0))
    torch.testing.assert_close(gaussian_kl(posterior()), expected)
    assert float(gaussian_kl(Posterior(torch.zeros(1, 1), torch.zeros(1, 1)))) == 0


def test_the_ratio_of_prior_and_posterior_is_torch_distributions_own() -> None:
    z = draw(K, N, D)
    expected = (Normal(0.0, 1.0).log_prob(z) - as_distribution(posterior()).log_prob(z)).sum(2)
    torch.testing.assert_close(log_prior_over_posterior(posterior(), z), expected)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihoods_are_torch_distributions_own(name: str) -> None:
    outputs, scale = draw(K, N, 2, 3, 3), 0.7
    images = draw(N, 2, 3, 3, seed=3).sign() if name == "bernoulli" else draw(N, 2, 3, 3, seed=3).clamp(-1, 1)
    found = LIKELIHOODS[name].nll(outputs, images, scale)
    if name == "bernoulli":
        distribution: Distribution = Bernoulli(logits=outputs)
        expected, mean = distribution.log_prob((images > 0).double()), 2 * distribution.mean - 1  # of white and black pixels
    else:
        distribution = {"gaussian": Normal, "l1": Laplace}[name](outputs, scale)
        expected, mean = distribution.log_prob(images), distribution.mean
    assert found.shape == (K, N)
    torch.testing.assert_close(found, -expected.sum((2, 3, 4)))
    torch.testing.assert_close(LIKELIHOODS[name].mean(outputs), mean)


def test_samples_of_the_posterior_have_its_moments() -> None:
    given = Posterior(torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, 2 * math.log(2)]]))
    z = sample_posterior(given, torch.randn(100_000, 1, 2, generator=torch.Generator().manual_seed(0)))[:, 0]
    torch.testing.assert_close(z.mean(0), given.mean[0], rtol=0, atol=0.03)
    torch.testing.assert_close(z.std(0), torch.tensor([1.0, 2.0]), rtol=0.02, atol=0)


def test_further_normals_are_standard_and_the_first_stays_as_it_is() -> None:
    first = draw(4000, 2)
    uniforms = torch.rand(4000, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    uniforms[0, 0] = 0.0
    z = standard_normals(first, uniforms)
    assert z.shape == (4, 4000, 2)
    assert torch.equal(z[0], first)
    assert bool(torch.isfinite(z).all())
    torch.testing.assert_close(z[2], Normal(0.0, 1.0).icdf(uniforms[:, 2:4]))
    flat = z.permute(1, 0, 2).flatten(1)
    torch.testing.assert_close(flat.T.cov(), torch.eye(8, dtype=torch.float64), rtol=0, atol=0.08)
    assert torch.equal(standard_normals(first, None), first[None])


def test_the_negative_elbo_by_hand() -> None:
    """One image, one dimension, q = N(1, 4): KL = (1 + 4 - 1 - log 4) / 2."""
    given, nll = Posterior(torch.tensor([[1.0]]), torch.tensor([[math.log(4.0)]])), torch.tensor([[3.0], [5.0]])
    kl = (4 - math.log(4)) / 2
    for weight, free, expected in ((1.0, 0.0, 4 + kl), (0.5, 0.0, 4 + kl / 2), (0.5, 9.0, 4 + 4.5), (0.0, 0.0, 4.0)):
        assert BOUNDS["elbo"](nll, given, torch.zeros(2, 1, 1), weight, free).item() == pytest.approx(expected, rel=1e-6)


def test_dimensions_below_the_free_bits_have_no_gradient() -> None:
    mean = torch.tensor([[0.1, 2.0], [2.0, 0.1]], requires_grad=True)  # KL = mean^2 / 2: 0.005 and 2 nats
    loss = BOUNDS["elbo"](torch.zeros(1, 2), Posterior(mean, torch.zeros(2, 2)), torch.zeros(1, 2, 2), 0.5, 0.25)
    torch.testing.assert_close(loss.detach(), torch.full((2,), 0.5 * (0.25 + 2.0)))
    (gradient,) = torch.autograd.grad(loss.sum(), mean)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))


# A linear Gaussian model: z ~ N(0, I), x | z ~ N(W z + b, s^2 I), so that x ~ N(b, W W' + s^2 I).

W, B, S = draw(6, D, seed=4), draw(6, seed=5), 0.6
X = draw(N, 6, seed=6)
LOG_LIKELIHOOD = MultivariateNormal(B, W @ W.T + S**2 * torch.eye(6, dtype=torch.float64)).log_prob(X)


def exact_posterior() -> tuple[Tensor, Tensor]:
    """Mean (N, D) and covariance (D, D) of p(z | x) (Bishop 2006, equation 12.42)."""
    precision = torch.eye(D, dtype=torch.float64) + W.T @ W / S**2
    return (X - B) @ W / S**2 @ precision.inverse(), precision.inverse()


def nll_of(z: Tensor) -> Tensor:
    return LIKELIHOODS["gaussian"].nll(z @ W.T + B, X, S)


def factorised() -> Posterior:
    """The best diagonal q: the exact mean, and the inverse of the precision's diagonal (Bishop 2006, section 10.1.2)."""
    mean, covariance = exact_posterior()
    return Posterior(mean, -covariance.inverse().diagonal().log().expand(N, D))


def bound(samples: int, seed: int = 7) -> Tensor:
    z = sample_posterior(factorised(), draw(samples, N, D, seed=seed))
    return -BOUNDS["importance"](nll_of(z), factorised(), z, 1.0, 0.0)


def test_the_importance_bound_of_many_samples_is_the_likelihood_of_a_linear_gaussian_model() -> None:
    """With a q that is wider than p(z | x) in every direction, so that the weights have a finite variance."""
    mean, covariance = exact_posterior()
    wide = Posterior(mean, torch.linalg.eigvalsh(covariance)[-1].mul(1.2).log().expand(N, D))
    z = sample_posterior(wide, draw(100_000, N, D, seed=7))
    found = -BOUNDS["importance"](nll_of(z), wide, z, 1.0, 0.0)
    torch.testing.assert_close(found, LOG_LIKELIHOOD, rtol=0, atol=0.02)


def test_the_elbo_of_a_linear_gaussian_model_is_its_closed_form() -> None:
    """log p(x) - KL(q || p(z | x)), which no sampling enters: p(z | x) and q are Gaussians."""
    mean, covariance = exact_posterior()
    q = MultivariateNormal(factorised().mean, torch.diag_embed(factorised().log_variance.exp()))
    expected = LOG_LIKELIHOOD - kl_divergence(q, MultivariateNormal(mean, covariance))
    z = sample_posterior(factorised(), draw(200_000, N, D, seed=8))
    found = -BOUNDS["elbo"](nll_of(z), factorised(), z, 1.0, 0.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)
    assert bool((expected < LOG_LIKELIHOOD - 0.05).all())  # else the two bounds could not be told apart


def test_one_sample_gives_the_elbo_and_more_a_tighter_bound() -> None:
    means = {samples: torch.stack([bound(samples, seed) for seed in range(4000 // samples)]).mean() for samples in (1, 4, 16)}
    z = sample_posterior(factorised(), draw(4000, N, D, seed=9))
    elbo = -BOUNDS["elbo"](nll_of(z), factorised(), z, 1.0, 0.0).mean()
    assert means[1].item() == pytest.approx(elbo.item(), abs=0.06)
    assert means[1] + 0.05 < means[4] < means[16] < LOG_LIKELIHOOD.mean()


def test_the_weight_is_the_ratio_s_power_in_the_importance_bound() -> None:
    z, nll = draw(K, N, D), draw(K, N, seed=3)
    ratio = log_prior_over_posterior(posterior(), z)
    for weight in (0.0, 0.3):
        expected = ((-nll).exp() * ratio.exp() ** weight).mean(0).log()
        torch.testing.assert_close(-BOUNDS["importance"](nll, posterior(), z, weight, 0.0), expected)


def test_the_mean_weight_does_not_overflow() -> None:
    torch.testing.assert_close(importance_bound(torch.tensor([[-1000.0], [-1000.0 + math.log(3)]])),
                               torch.tensor([-1000.0 + math.log(2)]))
