"""Bounds on log p(x) of latent-variable models, and the likelihoods p(x | z) in them: pure functions, in nats an image.

N images, K samples z ~ q(z | x) of each, D dimensions of z. Pixels are in [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


class Posterior(NamedTuple):
    """q(z | x) = N(mean, diag(exp(log_variance))), both (N, D)."""

    mean: Tensor
    log_variance: Tensor


class Likelihood(NamedTuple):
    """p(x | z) as a decoder's raw outputs give it.

    ``nll(outputs, images, scale)``: -log p(x | z) of each image, (K, N) of outputs (K, N, *shape) and images (N, *shape).
    ``mean(outputs)``: E[x | z], the sample to be shown.
    """

    nll: Callable[[Tensor, Tensor, float], Tensor]
    mean: Callable[[Tensor], Tensor]


def _bernoulli_nll(outputs: Tensor, images: Tensor, scale: float) -> Tensor:
    """Of (x + 1) / 2 in [0, 1], the outputs being logits; a likelihood for x in {-1, 1}, for values between its usual use."""
    shares = ((images + 1) / 2).expand_as(outputs)
    return binary_cross_entropy_with_logits(outputs, shares, reduction="none").flatten(2).sum(2)


def _bernoulli_mean(outputs: Tensor) -> Tensor:
    return 2 * outputs.sigmoid() - 1


def _gaussian_nll(outputs: Tensor, images: Tensor, scale: float) -> Tensor:
    """Of N(outputs, scale^2 I): the squared error over 2 scale^2, and a constant."""
    return (((outputs - images) / scale).square() + math.log(2 * math.pi * scale**2)).flatten(2).sum(2) / 2


def _laplace_nll(outputs: Tensor, images: Tensor, scale: float) -> Tensor:
    """Of a Laplace distribution around the outputs: the absolute error over scale, and a constant."""
    return ((outputs - images).abs() / scale + math.log(2 * scale)).flatten(2).sum(2)


def _as_it_is(outputs: Tensor) -> Tensor:
    return outputs


LIKELIHOODS: dict[str, Likelihood] = {
    "bernoulli": Likelihood(_bernoulli_nll, _bernoulli_mean),
    "gaussian": Likelihood(_gaussian_nll, _as_it_is),
    "l1": Likelihood(_laplace_nll, _as_it_is),
}


def sample_posterior(posterior: Posterior, standard: Tensor) -> Tensor:
    """z = mu + sigma * epsilon for epsilon = ``standard`` ~ N(0, I), (..., N, D) (Kingma and Welling 2014, section 2.4)."""
    return posterior.mean + (0.5 * posterior.log_variance).exp() * standard


def gaussian_kl(posterior: Posterior) -> Tensor:
    """KL(q(z | x) || N(0, I)) by dimension, (N, D) (Kingma and Welling 2014, appendix B)."""
    mean, log_variance = posterior
    return (mean.square() + log_variance.exp() - 1 - log_variance) / 2


def log_prior_over_posterior(posterior: Posterior, z: Tensor) -> Tensor:
    """log N(z; 0, I) - log q(z | x) of samples z (K, N, D): (K, N)."""
    mean, log_variance = posterior
    return ((z - mean).square() / log_variance.exp() + log_variance - z.square()).sum(2) / 2


def importance_bound(log_weights: Tensor) -> Tensor:
    """log 1/K sum_k w_k of log w_k = log p(x, z_k) - log q(z_k | x), (K, N) -> (N,) (Burda et al. 2016, equation 8).

    For K = 1 the evidence lower bound; it grows with K, in expectation, towards log p(x).
    """
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def _negative_elbo(nll: Tensor, posterior: Posterior, z: Tensor, kl_weight: float, free_bits: float) -> Tensor:
    """E_q[-log p(x | z)] + kl_weight sum_j max(free_bits, KL_j) (Kingma and Welling 2014, equation 10).

    Free bits (Kingma et al. 2016, equation 15) are by image and dimension here; the paper takes the maximum after a mean over
    the mini-batch, which would depend on how a batch is split over ranks.
    """
    return nll.mean(0) + kl_weight * gaussian_kl(posterior).clamp_min(free_bits).sum(1)


def _negative_importance_bound(nll: Tensor, posterior: Posterior, z: Tensor, kl_weight: float, free_bits: float) -> Tensor:
    """The ratio of prior and posterior to the power kl_weight; it has no divergence by dimension that could be free."""
    return -importance_bound(kl_weight * log_prior_over_posterior(posterior, z) - nll)


Bound = Callable[[Tensor, Posterior, Tensor, float, float], Tensor]

BOUNDS: dict[str, Bound] = {"elbo": _negative_elbo, "importance": _negative_importance_bound}
"""Losses of each image, (N,), by what they bound: of nll (K, N), the posterior, its samples z (K, N, D), the weight of the
divergence, and the nats of each dimension that are free."""


def standard_normals(first: Tensor, uniforms: Tensor | None) -> Tensor:
    """(K, N, D) draws of N(0, I): ``first`` (N, D), and K - 1 more made of U[0, 1), float64 (N, (K - 1) D), by the quantile."""
    if uniforms is None:
        return first[None]
    smallest = 2.0**-54  # below what a float64 draw can be but for 0
    more = torch.special.ndtri(uniforms.clamp_min(smallest)).to(first)
    return torch.cat([first[None], more.unflatten(1, (-1, first.shape[1])).transpose(0, 1)])
