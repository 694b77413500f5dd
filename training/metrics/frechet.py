"""Frechet distance between two feature sets, and the moments it needs, mergeable without loss.

The name "FID" belongs to this distance in the FID Inception's features only; in any other net it is "fd".
"""

from typing import NamedTuple

import torch
from torch import Tensor

from data_shards.errors import UserError
from training.metrics.checks import as_features, as_pair


class Moments(NamedTuple):
    """Sufficient statistics of a feature set: how many, their mean (d,), and their scatter (d, d), all float64.

    scatter = sum_i (x_i - mean)(x_i - mean)^T. It is centred because a sum of plain outer products cancels
    catastrophically where the features lie far from zero (an offset of 1e6 cost 1e-3 of the distance).
    """

    images: int
    mean: Tensor
    scatter: Tensor

    @property
    def cov(self) -> Tensor:
        """Unbiased covariance (d, d)."""
        if self.images < 2:
            raise UserError(f"A covariance of {self.images} images is undefined; give at least 2 images.")
        return self.scatter / (self.images - 1)


def moments(features: Tensor) -> Moments:
    """Moments of (N, d) features, N >= 1.

    Raises:
        UserError: malformed or non-finite features.
    """
    x = as_features(features, "given")
    mean = x.mean(dim=0)
    centred = x - mean
    return Moments(x.shape[0], mean, centred.T @ centred)


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two disjoint sets, from theirs alone (pairwise, Chan, Golub and LeVeque 1979).

    Associative up to rounding, so that workers can each keep their own and merge in any order.

    Raises:
        UserError: the two have different feature dimensions.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"Moments of {a.mean.shape[0]} and {b.mean.shape[0]} features cannot be merged; use one feature net."
        )
    if a.images == 0 or b.images == 0:
        return b if a.images == 0 else a
    images = a.images + b.images
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.images / images)
    scatter = a.scatter + b.scatter + torch.outer(delta, delta) * (a.images * b.images / images)
    return Moments(images, mean, scatter)


def frechet_from_moments(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians (Dowson and Landau 1982; Heusel et al. 2017, eq. 6).

        |mu1 - mu2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2))

    C1 = A A^T by a symmetric eigendecomposition, and C1 C2 has the eigenvalues of the symmetric positive
    semi-definite A^T C2 A; the trace of its root is the sum of their roots. Nothing here can turn complex, as a general
    matrix square root does on singular covariances.

    Args:
        mu1, mu2: means (d,).
        cov1, cov2: covariances (d, d), singular ones allowed.

    Returns:
        The squared distance, >= 0 up to rounding (a rounding below zero is returned as 0).

    Raises:
        UserError: shapes that do not fit, or non-finite values.
    """
    d = mu1.shape[0]
    if mu2.shape != (d,) or cov1.shape != (d, d) or cov2.shape != (d, d):
        raise UserError(
            f"Moments of shapes {tuple(mu1.shape)}, {tuple(cov1.shape)}, {tuple(mu2.shape)}, {tuple(cov2.shape)} "
            "do not fit together; take both from one feature net."
        )
    mu1, cov1, mu2, cov2 = (t.detach().to(torch.float64) for t in (mu1, cov1, mu2, cov2))
    if not all(bool(torch.isfinite(t).all()) for t in (mu1, cov1, mu2, cov2)):
        raise UserError("The moments hold NaN or infinity; look at the generator's output for non-finite pixels.")
    eigenvalues, vectors = torch.linalg.eigh(cov1)
    root = vectors * eigenvalues.clamp_min(0).sqrt()  # A with A A^T = C1
    product = torch.linalg.eigvalsh(root.T @ cov2 @ root).clamp_min(0)
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * product.sqrt().sum()
    return max(0.0, float(distance))


def frechet_distance(fake: Tensor, real: Tensor) -> float:
    """Squared Frechet distance of two feature sets, fake (N, d) and real (M, d), N, M >= 2.

    Biased upwards: two samples of N of one whitened distribution come out at about 2d/N + d(d+1)/(2N). So compare it at
    equal counts only, and prefer KID below some thousand images.

    Raises:
        UserError: malformed or non-finite features, fewer than 2 images.
    """
    fake, real = as_pair(fake, real, ("fake", "real"), at_least=2)
    m1, m2 = moments(fake), moments(real)
    return frechet_from_moments(m1.mean, m1.cov, m2.mean, m2.cov)
