"""The VAE-GAN's phases: whom each gradient reaches, and that a result does not depend on how the batch was split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from training.draws import latents, uniforms
from training.families import FAMILIES, Batch, Phase
from training.models.autoencoder import Autoencoder
from training.networks import make_networks
from training.objectives.variational import Posterior, gaussian_kl, sample_posterior
from training.recipe import TrainingConfig
from training.world import World

N, SHAPE, SEED, CODES = 8, (1, 16, 16), 5, 3
IMAGES = torch.rand(N, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def config(objective: dict[str, Any] | None = None, **vae: Any) -> TrainingConfig:
    return TrainingConfig.model_validate({
        "family": "vaegan", "generator": {"channels": 4, "latent_dim": CODES}, "discriminator": {"channels": 4},
        "objective": {"loss": "non_saturating", **(objective or {})}, "images": N, "batch": N,
        "vae": {"reconstruction": "bernoulli", **vae}})


def made(settings: TrainingConfig) -> tuple[Autoencoder, nn.Module, list[Phase]]:
    networks = make_networks(settings, SHAPE, SEED)
    generator = networks["generator"]
    assert isinstance(generator, Autoencoder)
    return generator, networks["discriminator"], FAMILIES["vaegan"].phases(settings, settings.augmentation)


def batch(phases: list[Phase], world: World | None = None, **weights: float) -> Batch:
    world = world or World()
    return Batch(world.slice(IMAGES), torch.full((N // world.size,), -1),
                 {phase.network: latents(SEED, phase.network, 0, N, CODES, world) for phase in phases},
                 {"kl": 0.0, "adversarial": 0.0, **weights},
                 {f"{phase.network} {purpose}": uniforms(SEED, f"{phase.network} {purpose}", 0, N, count, world)
                  for phase in phases for purpose, count in phase.uniforms.items() if count})


def codes_by_hand(generator: Autoencoder, given: Batch, phase: str) -> tuple[Tensor, Tensor]:
    """The codes of the fakes, and which of them are encoded."""
    z = given.latents[phase]
    mean, log_variance = (moment.detach() for moment in generator.encode(IMAGES))
    encoded = given.uniforms[f"{phase} code"][:, 0] < 0.5
    return torch.stack([m + (v / 2).exp() * e if taken else e
                        for m, v, e, taken in zip(mean, log_variance, z, encoded, strict=True)]), encoded


def test_the_discriminator_judges_reconstructions_and_draws_of_the_prior() -> None:
    generator, d, phases = made(config())
    given = batch(phases)
    codes, encoded = codes_by_hand(generator, given, "discriminator")
    assert 0 < int(encoded.sum()) < N
    expected = softplus(d(generator(codes))).mean() + softplus(-d(IMAGES)).mean()
    terms = phases[0].loss({"generator": generator, "discriminator": d}, given)
    assert terms["total"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("compare", ["features", "pixels"])
def test_the_generator_s_loss_is_the_sum_by_hand(compare: str) -> None:
    generator, d, phases = made(config(compare=compare))
    given = batch(phases, kl=0.3, adversarial=0.7)
    posterior = Posterior(*generator.encode(IMAGES))
    outputs = generator.decode(sample_posterior(posterior, given.latents["generator"]))
    if compare == "pixels":
        shares = (IMAGES + 1) / 2
        error = -(shares * outputs.sigmoid().log() + (1 - shares) * (1 - outputs.sigmoid()).log()).flatten(1).sum(1).mean()
    else:
        features: Any = d.features
        error = (features(IMAGES) - features(2 * outputs.sigmoid() - 1)).square().sum(1).mean() / 2
    codes, _ = codes_by_hand(generator, given, "generator")
    adversarial = softplus(-d(generator(codes))).mean()
    expected = error + 0.3 * gaussian_kl(posterior).sum(1).mean() + 0.7 * adversarial
    terms = phases[1].loss({"generator": generator, "discriminator": d}, given)
    assert terms["total"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert terms["reconstruction"].item() == pytest.approx(error.item(), rel=1e-4)
    ours, theirs = (torch.autograd.grad(loss, list(generator.parameters())) for loss in (terms["total"], expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_the_adversarial_term_does_not_reach_the_encoder() -> None:
    generator, d, phases = made(config())
    project: Any = generator.decoder.project
    ends = [generator.encoder.moments.weight, project.weight]
    found = []
    for weight in (0.0, 1000.0):
        terms = phases[1].loss({"generator": generator, "discriminator": d}, batch(phases, adversarial=weight))
        found.append(torch.autograd.grad(terms["total"], ends))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found[0][1], found[1][1], rtol=1e-1)


@pytest.mark.parametrize("network", [0, 1])
def test_however_a_batch_is_split_the_gradient_is_the_same(network: int) -> None:
    generator, d, phases = made(config({"loss": "relativistic"}))
    networks = {"generator": generator, "discriminator": d}
    weights = {"kl": 0.5, "adversarial": 0.5, "r1": 0.1, "r2": 0.1}
    name = phases[network].network

    def gradient(given: Batch) -> list[Tensor]:
        return list(torch.autograd.grad(phases[network].loss(networks, given)["total"], list(networks[name].parameters())))

    whole = gradient(batch(phases, World(), **weights))
    split = [gradient(part) for rank in range(2) for part in batch(phases, World(rank, 2), **weights).parts(2)]
    for i, expected in enumerate(whole):
        torch.testing.assert_close(torch.stack([one[i] for one in split]).mean(0), expected, rtol=1e-3, atol=1e-5)
