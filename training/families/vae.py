"""Variational autoencoders (Kingma and Welling 2014) and their deterministic case: encoder and decoder are one network, which
one engine steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from training.config import Config, one_of
from training.families.family import Family
from training.families.phase import Batch, Networks, Phase, Terms
from training.models.autoencoder import AUTOENCODERS, Autoencoder
from training.models.layers import Shape
from training.objectives.variational import (
    BOUNDS,
    LIKELIHOODS,
    Posterior,
    gaussian_kl,
    sample_posterior,
    standard_normals,
)
from training.schedule import Schedule, check_schedule

if TYPE_CHECKING:
    from training.recipe import TrainingConfig


class VaeConfig(Config):
    """Of the families vae, autoencoder and vaegan."""

    reconstruction: str = Field(
        "gaussian", description=f"likelihood of an image given its code, summed over pixels: {', '.join(LIKELIHOODS)}; "
                                "bernoulli takes pixels as shares of white, gaussian is the squared error, l1 the absolute one")
    scale: float = Field(0.5, gt=0, description="standard deviation of gaussian, scale of l1, where pixels are in [-1, 1]")
    kl_weight: Schedule = Field(1.0, description="weight of the divergence from the prior; [[0, 0], [50000, 1]] warms it up, "
                                                 "and trials have the last value")
    free_bits: float = Field(0.0, ge=0, description="nats of each latent dimension's divergence that cost nothing; elbo only")
    bound: str = Field("elbo", description=f"bound on the likelihood that is raised: {', '.join(BOUNDS)} (IWAE's)")
    samples: int = Field(1, ge=1, description="codes drawn for each image; for importance, its K")
    compare: Literal["features", "pixels"] = Field(
        "features", description="vaegan: reconstructions and images are compared in D's last features, or by `reconstruction`")
    adversarial_weight: Schedule = Field(1.0, description="vaegan: weight of the adversarial term in the decoder's loss")

    _reconstruction = field_validator("reconstruction")(one_of(lambda: LIKELIHOODS, "likelihood"))
    _bound = field_validator("bound")(one_of(lambda: BOUNDS, "bound"))
    _schedules = field_validator("kl_weight", "adversarial_weight")(check_schedule)

    @model_validator(mode="after")
    def _free_bits_are_elbo_s(self) -> VaeConfig:
        if self.free_bits and self.bound != "elbo":
            raise ValueError("free_bits are of divergences by dimension, which the importance bound has none of; set it to 0, "
                             "or bound to elbo")
        return self


def make_autoencoder(config: TrainingConfig, shape: Shape) -> Autoencoder:
    """The model of ``config.generator``, whose samples are the means of the recipe's likelihood."""
    network = AUTOENCODERS[config.generator.model](config.generator, shape)
    network.mean = LIKELIHOODS[config.vae.reconstruction].mean
    return network


def autoencoder_of(networks: Networks) -> Autoencoder:
    network = networks["generator"]
    assert isinstance(network, Autoencoder)
    return network


def posterior_of(network: Autoencoder, batch: Batch) -> Posterior:
    """q(z | x) of the batch's images, in float32."""
    mean, log_variance = network.encode(batch.images, batch.labels)
    return Posterior(mean.float(), log_variance.float())


def decode_samples(network: Autoencoder, z: Tensor, labels: Tensor) -> Tensor:
    """Raw outputs (K, N, *shape) of codes z (K, N, D), in float32."""
    return network.decode(z.flatten(0, 1), labels.repeat(len(z))).float().unflatten(0, z.shape[:2])


def vae_phases(config: VaeConfig, latent_dim: int) -> list[Phase]:
    """One phase; the batch's weight "kl" is the divergence's. The terms ``elbo`` and ``kl`` know neither it nor free bits."""
    likelihood, bound, samples = LIKELIHOODS[config.reconstruction], BOUNDS[config.bound], config.samples

    def generator(networks: Networks, batch: Batch) -> Terms:
        network = autoencoder_of(networks)
        posterior = posterior_of(network, batch)
        z = sample_posterior(posterior, standard_normals(batch.latents["generator"],
                                                         batch.uniforms["generator samples"] if samples > 1 else None))
        nll = likelihood.nll(decode_samples(network, z, batch.labels), batch.images, config.scale)
        total = bound(nll, posterior, z, batch.weights["kl"], config.free_bits).mean()
        reconstruction, kl = nll.detach().mean(), gaussian_kl(posterior).detach().sum(1).mean()
        return {"total": total, "reconstruction": reconstruction, "kl": kl, "elbo": -(reconstruction + kl)}

    return [Phase("generator", generator, uniforms={"samples": (samples - 1) * latent_dim})]


def autoencoder_phases(config: VaeConfig) -> list[Phase]:
    likelihood = LIKELIHOODS[config.reconstruction]

    def generator(networks: Networks, batch: Batch) -> Terms:
        network = autoencoder_of(networks)
        outputs = decode_samples(network, posterior_of(network, batch).mean[None], batch.labels)
        loss = likelihood.nll(outputs, batch.images, config.scale).mean()
        return {"total": loss, "reconstruction": loss.detach()}

    return [Phase("generator", generator)]


def _networks(config: TrainingConfig, shape: Shape) -> dict[str, nn.Module]:
    return {"generator": make_autoencoder(config, shape)}


VAE = Family(
    names=("generator",), networks=_networks, models=AUTOENCODERS,
    phases=lambda config, augmentation: vae_phases(config.vae, config.generator.latent_dim),
    shown={"ELBO": "generator/elbo", "KL": "generator/kl"})

AUTOENCODER = Family(
    names=("generator",), networks=_networks, models=AUTOENCODERS,
    phases=lambda config, augmentation: autoencoder_phases(config.vae),
    shown={"reconstruction": "generator/reconstruction"})
"""The code of an image is its mean, and nothing draws codes to the prior. What is sampled is N(0, I) decoded all the same: not
a model of the images, but what shows how far from one a plain autoencoder is."""
