"""The simplest probabilistic generator: a mixture of Gaussians on principal components, fitted at once by maximum likelihood.

The components are PCA's, whitened; the mixture is fitted by EM (scikit-learn's `GaussianMixture`). Few images cannot carry
many covariances, so there is at most one Gaussian for every `DensityConfig.images_per_gaussian` images, and a ridge on each
covariance, in units of the images' own variance along each component. What the components leave out is not modelled: samples
lie in their span.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from data_shards.errors import UserError
from training.config import Config
from training.families.family import Family
from training.models.layers import Shape

if TYPE_CHECKING:
    from training.recipe import TrainingConfig


class DensityConfig(Config):
    gaussians: int = Field(10, ge=1, description="Gaussians of the mixture at most; the principal components are one less than "
                                                 "generator.latent_dim")
    images_per_gaussian: int = Field(50, ge=1, description="images that a Gaussian needs; with fewer there are fewer of them")
    ridge: float = Field(0.05, gt=0, description="added to each Gaussian's variances, in shares of the images' variance along "
                                                 "the component")
    images: int = Field(20_000, ge=2, description="images of the source that are fitted, at most; the first in data order")


class GaussianMixture(nn.Module):
    """z (N, latent_dim) -> samples (N, *shape) in [-1, 1]: the first normal chooses the Gaussian, through its distribution
    function, and the others are its noise.

    x = mean + basis (means_k + cholesky_k z'), with ``basis`` the principal directions times the deviations along them. What
    was not needed has no effect: weights of 0, directions of 0.
    """

    mean: Tensor
    basis: Tensor
    weights: Tensor
    means: Tensor
    cholesky: Tensor

    def __init__(self, shape: Shape, gaussians: int, components: int) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("mean", torch.zeros(math.prod(shape)))
        self.register_buffer("basis", torch.zeros(components, math.prod(shape)))
        self.register_buffer("weights", torch.zeros(gaussians).index_fill(0, torch.tensor(0), 1.0))
        self.register_buffer("means", torch.zeros(gaussians, components))
        self.register_buffer("cholesky", torch.eye(components).repeat(gaussians, 1, 1))

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        share = torch.special.ndtr(z[:, 0].double())[:, None]
        # The last Gaussian that has a weight takes what rounding leaves.
        chosen = (share >= self.weights.double().cumsum(0)).sum(1).clamp(max=int((self.weights > 0).sum()) - 1)
        coordinates = self.means[chosen] + torch.einsum("nij,nj->ni", self.cholesky[chosen], z[:, 1:])
        return (self.mean + coordinates @ self.basis).view(-1, *self.shape).clamp(-1, 1)

    def coordinates(self, images: Tensor) -> Tensor:
        """Images (N, *shape) in [-1, 1] on the whitened principal components, (N, components)."""
        squares = self.basis.square().sum(1)
        return (images.flatten(1) - self.mean) @ (self.basis / squares.where(squares > 0, 1)[:, None]).T

    def log_likelihood(self, images: Tensor) -> Tensor:
        """Log-density (N,), in nats, of the images' coordinates (float64)."""
        used = int((self.basis.square().sum(1) > 0).sum())
        x, cholesky = self.coordinates(images).double(), self.cholesky.double()
        noise = torch.linalg.solve_triangular(cholesky, (x - self.means.double()[:, None]).mT, upper=False)  # (K, d, N)
        log_det = cholesky.diagonal(dim1=1, dim2=2).log().sum(1)
        each = -0.5 * noise.square().sum(1) - log_det[:, None] - 0.5 * used * math.log(2 * math.pi)
        return (each + self.weights.double().log()[:, None]).logsumexp(0)


def fit(network: nn.Module, config: TrainingConfig, images: Tensor, seed: int) -> dict[str, float]:
    """Fit a `GaussianMixture` to ``images`` uint8 (N, C, H, W), N >= 2, in place.

    Raises:
        UserError: when all images are alike.

    Returns:
        The images' mean ``log_likelihood`` in nats, and how many ``gaussians`` and ``components`` were used.
    """
    from sklearn import mixture
    from sklearn.decomposition import PCA
    from sklearn.exceptions import ConvergenceWarning

    assert isinstance(network, GaussianMixture)
    settings, pixels = config.density, (images.double() / 127.5 - 1).flatten(1).cpu()
    gaussians = min(settings.gaussians, max(1, len(pixels) // settings.images_per_gaussian))
    pca = PCA(min(network.basis.shape[0], len(pixels) - 1, pixels.shape[1]), whiten=True, random_state=seed)
    coordinates = pca.fit_transform(pixels.numpy())
    known = int((pca.explained_variance_ > 1e-9).sum())  # images that repeat, or have few colours, span less
    if not known:
        raise UserError(f"the {len(images)} images to fit are all alike, which is no distribution; give others.")
    model = mixture.GaussianMixture(gaussians, reg_covar=settings.ridge, random_state=seed, max_iter=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of EM that is still gaining a little
        model.fit(coordinates[:, :known])
    directions = pca.components_[:known] * pca.explained_variance_[:known, None] ** 0.5
    covariances = torch.from_numpy(model.covariances_)
    with torch.no_grad():
        for buffer in (network.basis, network.weights, network.means):
            buffer.zero_()
        network.mean.copy_(torch.from_numpy(pca.mean_))
        network.basis[:known] = torch.from_numpy(directions).to(network.basis)
        network.weights[:gaussians] = torch.from_numpy(model.weights_).to(network.weights)
        network.means[:gaussians, :known] = torch.from_numpy(model.means_).to(network.means)
        network.cholesky.copy_(torch.eye(network.basis.shape[0]))
        network.cholesky[:gaussians, :known, :known] = torch.linalg.cholesky(covariances).to(network.cholesky)
    return {"generator/log_likelihood": float(model.score(coordinates[:, :known])), "generator/gaussians": float(gaussians),
            "generator/components": float(known)}


def make_mixture(config: TrainingConfig, shape: Shape) -> dict[str, nn.Module]:
    """A mixture that was not fitted yet."""
    if config.generator.latent_dim < 2:
        raise UserError("training.generator.latent_dim = 1 leaves the family density no principal component; use 2 or more.")
    return {"generator": GaussianMixture(shape, config.density.gaussians, config.generator.latent_dim - 1)}


DENSITY = Family(
    names=("generator",),
    networks=make_mixture,
    models={},
    phases=lambda config, augmentation: [],
    shown={"log-likelihood": "generator/log_likelihood"},
    fit=fit)
