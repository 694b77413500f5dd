"""VAE-GAN (Larsen et al. 2016): an autoencoder whose reconstructions are compared in the features of a discriminator, which
tells images from decoded codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from training.augment import AugmentConfig
from training.families.family import Family
from training.families.gan import gan_phases
from training.families.phase import Batch, Networks, Phase, Terms
from training.families.vae import autoencoder_of, decode_samples, make_autoencoder, posterior_of
from training.models import make_gan
from training.models.autoencoder import AUTOENCODERS
from training.models.layers import Shape
from training.objectives.variational import LIKELIHOODS, gaussian_kl, sample_posterior

if TYPE_CHECKING:
    from training.recipe import TrainingConfig


def half_encoded(networks: Networks, batch: Batch, phase: str) -> Tensor:
    """Codes of the fakes, (N, latent_dim): drawn from the prior or, of one image in two, from q(z | x), which learns nothing
    from what D thinks of them (Larsen et al. 2016, section 2.2 and algorithm 1, where every image has both)."""
    z = batch.latents[phase]
    with torch.no_grad():
        encoded = sample_posterior(posterior_of(autoencoder_of(networks), batch), z)
    return torch.where((batch.uniforms[f"{phase} code"] < 0.5).to(z.device), encoded, z)


def vaegan_phases(config: TrainingConfig, augmentation: AugmentConfig) -> list[Phase]:
    """A GAN's two phases, the generator's with the divergence and the reconstruction added.

    L = kl_weight KL + reconstruction + adversarial_weight L_GAN: Larsen et al. 2016's gamma, which weighs the decoder's
    reconstruction, is 1 / adversarial_weight. In features the reconstruction is |f(x) - f(x~)|^2 / 2, its equation 7.
    """
    likelihood = LIKELIHOODS[config.vae.reconstruction]
    discriminator, deceive = (
        replace(phase, uniforms={**phase.uniforms, "code": 1})
        for phase in gan_phases(config.objective.loss, exact=config.exact_penalties, packed=config.objective.pack,
                                augmentation=augmentation, codes=half_encoded))

    def reconstruction(networks: Networks, outputs: Tensor, images: Tensor) -> Tensor:
        """Of one sample of each image's code, (N,)."""
        if config.vae.compare == "pixels":
            return likelihood.nll(outputs, images, config.vae.scale)[0]
        features = cast(Callable[[Tensor], Tensor], networks["discriminator"].features)
        with torch.no_grad():
            wanted = features(images).float()
        found = features(likelihood.mean(outputs[0])).float()
        return (found - wanted).square().sum(1) / 2

    def generator(networks: Networks, batch: Batch) -> Terms:
        network = autoencoder_of(networks)
        posterior = posterior_of(network, batch)
        z = sample_posterior(posterior, batch.latents["generator"][None])
        error = reconstruction(networks, decode_samples(network, z, batch.labels), batch.images).mean()
        kl = gaussian_kl(posterior)
        divergence = kl.clamp_min(config.vae.free_bits).sum(1).mean()
        adversarial = deceive.loss(networks, batch)["total"]
        return {"total": batch.weights["kl"] * divergence + error + batch.weights["adversarial"] * adversarial,
                "reconstruction": error.detach(), "kl": kl.detach().sum(1).mean(), "adversarial": adversarial.detach()}

    return [discriminator, replace(deceive, loss=generator)]


def _networks(config: TrainingConfig, shape: Shape) -> dict[str, nn.Module]:
    gan = make_gan(config.generator, config.discriminator, shape, config.objective.pack)
    return {"generator": make_autoencoder(config, shape), "discriminator": gan["discriminator"]}


VAEGAN = Family(
    names=("generator", "discriminator"), networks=_networks, phases=vaegan_phases, models=AUTOENCODERS,
    differentiable=False,  # codes of images learn nothing from D, and D's features of them are held
    shown={"D": "discriminator/adversarial", "G": "generator/adversarial", "KL": "generator/kl"})
