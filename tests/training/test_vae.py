"""The families vae and autoencoder: their phases, through every engine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal, kl_divergence

from data_shards import Batch as Images
from tests.ranks import run_ranks
from training.draws import latents, uniforms
from training.engines import EngineConfig, make_engine, whole_weights
from training.families import FAMILIES, Batch
from training.families.vae import VaeConfig, autoencoder_phases, vae_phases
from training.loop import Plan, State, train
from training.models.autoencoder import Autoencoder
from training.networks import make_networks
from training.recipe import TrainingConfig
from training.world import World

BATCH, STEPS, SEED, SHAPE, CODES, SAMPLES, LR = 8, 5, 3, (1, 8, 8), 4, 3, 1e-3
WARM_UP = [(0.0, 0.0), (BATCH * 4.0, 1.0)]
Weights = dict[str, Tensor]


def config(engine: EngineConfig | None = None, **vae: Any) -> TrainingConfig:
    generator = {"model": "mlp", "channels": 16, "latent_dim": CODES, "mlp": {"layers": 2}, "lr": LR, "betas": (0.9, 0.999)}
    return TrainingConfig.model_validate({
        "family": "vae", "generator": generator, "images": BATCH * STEPS, "batch": BATCH,
        "engine": (engine or EngineConfig(kind="torch")).model_dump(),
        "vae": {"reconstruction": "bernoulli", "kl_weight": WARM_UP, **vae}})


def images(at: int) -> Tensor:
    """The global batch, uint8 and black or white."""
    return torch.randint(0, 2, (BATCH, *SHAPE), generator=torch.Generator().manual_seed(at)).mul(255).to(torch.uint8)


def stream(world: World) -> Iterator[Images]:
    at = 0
    while True:
        share = world.slice(images(at))
        none = torch.full((len(share),), -1)
        at += BATCH
        yield Images(share, none, none, np.zeros(len(share), "S1"), at)


def through_an_engine(world: World, engine: EngineConfig, samples: int) -> Weights:
    settings = config(engine, samples=samples, bound="importance" if samples > 1 else "elbo")
    network = make_networks(settings, SHAPE, SEED)["generator"]
    stepper = make_engine("generator", network, settings.generator, engine, world, batch=BATCH // world.size)
    plan = Plan(until=BATCH * STEPS, batch=BATCH, seed=SEED, latent_dim=CODES, lr={"generator": LR},
                weights=settings.weights(), ema_halflife_images=20.0, accumulation=engine.accumulation)
    train(State({"generator": stepper}, {}), FAMILIES["vae"].phases(settings, settings.augmentation), stream(world), plan,
          world=world)
    weights = whole_weights(stepper)
    stepper.close()
    return weights


def plain_torch(samples: int, weight: float | None = None) -> Weights:
    """The same run by hand: torch.distributions, the whole batch, no phase or loop of the project."""
    network = make_networks(config(), SHAPE, SEED)["generator"]
    assert isinstance(network, Autoencoder)
    optimizer = torch.optim.Adam(network.parameters(), lr=LR, betas=(0.9, 0.999))
    for at in range(0, BATCH * STEPS, BATCH):
        beta = min(at / (BATCH * 4), 1.0) if weight is None else weight
        x = images(at).float() / 255
        mean, log_variance = network.encoder(2 * x - 1)
        q, prior = Normal(mean, (log_variance / 2).exp()), Normal(torch.zeros(CODES), 1.0)
        noise = [latents(SEED, "generator", at, BATCH, CODES)]
        extra = uniforms(SEED, "generator samples", at, BATCH, (samples - 1) * CODES)
        noise += [torch.special.ndtri(part).float() for part in extra.split(CODES, 1)] if samples > 1 else []
        logs = []
        for epsilon in noise:
            z = mean + (log_variance / 2).exp() * epsilon
            log_p = Bernoulli(logits=network.decoder(z)).log_prob(x).sum((1, 2, 3))
            logs.append(log_p + beta * (prior.log_prob(z) - q.log_prob(z)).sum(1) if samples > 1
                        else log_p - beta * kl_divergence(q, prior).sum(1))
        loss = -(torch.stack(logs).logsumexp(0) - math.log(samples)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: value.detach() for name, value in network.state_dict().items()}


def distance(ours: Weights, theirs: Weights) -> float:
    """Largest difference over the bound of DESIGN 7: a thousandth of the largest movement."""
    start = make_networks(config(), SHAPE, SEED)["generator"].state_dict()
    moved = max(float((theirs[name] - start[name]).abs().max()) for name in start)
    return max(float((ours[name] - theirs[name]).abs().max()) for name in start) / (1e-3 * moved)


ENGINES = {
    **{f"zero {zero}": EngineConfig(kind="deepspeed", zero=zero, persistence_threshold=0) for zero in range(4)},
    "zero 2, 2 micro-batches": EngineConfig(kind="deepspeed", zero=2, accumulation=2),
    "torch": EngineConfig(kind="torch"),
    "torch, activations again": EngineConfig(kind="torch", checkpoint_activations=True),
}


def every_engine(world: World) -> dict[str, Weights]:
    return {f"{name}, {samples}": through_an_engine(world, engine, samples)
            for name, engine in ENGINES.items() if engine.kind == "deepspeed" for samples in (1, SAMPLES)}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Weights]]:
    return run_ranks(every_engine, 2)


@pytest.mark.parametrize("samples", [1, SAMPLES])
@pytest.mark.parametrize("name", ENGINES)
def test_engines_equal_plain_torch(two_ranks: list[dict[str, Weights]], name: str, samples: int) -> None:
    """DeepSpeed's on two ranks: also that K samples of a batch are the same, however it is split."""
    reference = plain_torch(samples)
    if ENGINES[name].kind == "torch":
        assert distance(through_an_engine(World(), ENGINES[name], samples), reference) <= 1
    else:
        assert all(distance(rank[f"{name}, {samples}"], reference) <= 1 for rank in two_ranks)


@pytest.mark.parametrize("samples", [1, SAMPLES])
def test_a_divergence_without_warm_up_is_noticed(samples: int) -> None:
    assert distance(plain_torch(samples, weight=1.0), plain_torch(samples)) > 100


# The phases themselves.


def one_batch(world: World | None = None) -> Batch:
    world = world or World()
    return Batch(world.slice(images(0).float() / 127.5 - 1), torch.full((BATCH // world.size,), -1),
                 {"generator": latents(SEED, "generator", 0, BATCH, CODES, world)}, {"kl": 0.5})


@pytest.mark.parametrize("reconstruction", ["bernoulli", "gaussian", "l1"])
def test_the_terms_add_up(reconstruction: str) -> None:
    settings = config(reconstruction=reconstruction, free_bits=0.2)
    found = make_networks(settings, SHAPE, SEED)
    (phase,) = vae_phases(settings.vae, CODES)
    terms = {name: value.item() for name, value in phase.loss(found, one_batch()).items()}
    assert terms["elbo"] == pytest.approx(-terms["reconstruction"] - terms["kl"])
    assert terms["total"] >= terms["reconstruction"] + 0.5 * max(terms["kl"], 0.2 * CODES) - 1e-3
    no_bits = vae_phases(settings.vae.model_copy(update={"free_bits": 0.0}), CODES)[0].loss(found, one_batch())
    assert no_bits["total"].item() == pytest.approx(terms["reconstruction"] + 0.5 * terms["kl"], rel=1e-5)


def test_one_importance_sample_and_more() -> None:
    """The bound of more samples is the tighter one on the same network."""
    found = make_networks(config(), SHAPE, SEED)
    network = found["generator"]
    assert isinstance(network, Autoencoder)
    nn.init.normal_(network.encoder.moments.weight, std=0.5)  # a posterior that is far from the best one
    totals = []
    for samples in (1, 4, 64):
        (phase,) = vae_phases(VaeConfig(reconstruction="bernoulli", bound="importance", samples=samples), CODES)
        given = dataclasses.replace(one_batch(), weights={"kl": 1.0}, uniforms={
            "generator samples": uniforms(SEED, "generator samples", 0, BATCH, (samples - 1) * CODES)})
        totals.append(phase.loss(found, given)["total"].item())
    assert totals[0] > totals[1] > totals[2]


def test_an_autoencoder_has_no_noise_and_no_divergence() -> None:
    found = make_networks(config(), SHAPE, SEED)
    (phase,) = autoencoder_phases(VaeConfig(reconstruction="l1", scale=1.0))
    first, second = one_batch(), dataclasses.replace(one_batch(), latents={}, weights={})
    network = found["generator"]
    assert isinstance(network, Autoencoder)
    outputs = network.decode(network.encode(first.images)[0])
    expected = (outputs - first.images).abs().flatten(1).sum(1).mean() + math.log(2) * math.prod(SHAPE)
    for given in (first, second):
        assert phase.loss(found, given)["total"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("family", ["vae", "autoencoder"])
def test_images_are_learned(family: str) -> None:
    """Eight images over and over: the reconstruction gains what a code of each is worth."""
    settings = config(kl_weight=0.0 if family == "autoencoder" else 0.1).model_copy(update={"family": family})
    found = make_networks(settings, SHAPE, SEED)
    stepper = make_engine("generator", found["generator"], settings.generator, settings.engine, World(), batch=BATCH)
    reports: list[dict[str, float]] = []
    plan = Plan(until=BATCH * 400, batch=BATCH, seed=SEED, latent_dim=CODES, lr={"generator": 5e-3},
                weights=settings.weights(), ema_halflife_images=0.0, report_every_images=BATCH * 20)
    same = next(stream(World()))
    train(State({"generator": stepper}, {}), FAMILIES[family].phases(settings, settings.augmentation), iter([same] * 400), plan,
          report=lambda _, metrics: reports.append(metrics))
    assert reports[-1]["generator/reconstruction"] < 0.4 * reports[0]["generator/reconstruction"]


def test_samples_are_the_means_of_the_likelihood() -> None:
    z = torch.randn(5, CODES) * 20
    for reconstruction in ("bernoulli", "gaussian", "l1"):
        network = make_networks(config(reconstruction=reconstruction), SHAPE, SEED)["generator"]
        assert isinstance(network, Autoencoder)
        raw = network.decode(z)
        expected = torch.tanh(raw / 2) if reconstruction == "bernoulli" else raw  # 2 sigmoid(t) - 1 = tanh(t / 2)
        torch.testing.assert_close(network(z), expected)


def test_both_halves_are_compiled() -> None:
    network = make_networks(config(), SHAPE, SEED)["generator"]
    assert isinstance(network, Autoencoder)
    network.compile(backend="eager")
    assert network.encoder._compiled_call_impl is not None
    assert network.decoder._compiled_call_impl is not None
