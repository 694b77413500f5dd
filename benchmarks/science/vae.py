"""A variational autoencoder on binarised MNIST, Burda et al. 2016's with one stochastic layer: how likely are the test digits?

    python -m benchmarks.science.vae [--epochs N] [--bound elbo|importance] [--samples K] [--nll-images N] [--nll-samples N]
                                     [--out FILE]

784-200-200-50-200-200-784, pixels drawn anew at each visit with their grey value as the probability of white, the test digits
once by seed 0. The paper has tanh units, batches of 20 and 3,280 epochs; here they are leaky rectifiers, 100, and what --epochs
says, and the moving average of the weights is judged. The family's own phases and graft's loop train it.

Negative log-likelihoods in nats that others give for this network, with 5,000 importance samples: 86.76 (Burda et al. 2016,
table 1, VAE, k = 1), 87.75 (github.com/nbip/IWAE), 90.26 (github.com/abdulfatir/IWAE-tensorflow, 400,000 steps of 100); trained
with 5 importance samples 85.54, 85.50 and 88.49.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_shards import Batch as Images
from data_shards.datasets.download import get_archive
from data_shards.datasets.mnist import ARCHIVE, read_images
from training.draws import generator as draw
from training.ema import make_average, whole_average
from training.engines import make_engine
from training.families import FAMILIES
from training.loop import Plan, State, to_signed, train
from training.models.autoencoder import Autoencoder
from training.networks import load_weights, make_networks
from training.objectives.variational import (
    LIKELIHOODS,
    Posterior,
    gaussian_kl,
    importance_bound,
    log_prior_over_posterior,
    sample_posterior,
)
from training.recipe import TrainingConfig
from training.world import World

BATCH, SEED = 100, 0
CHUNK = 5000  # codes decoded at once


def binarised(images: Tensor, purpose: str, at: int) -> Tensor:
    """uint8 (N, ...) -> 0 or 255, white with the probability of the grey value."""
    chances = torch.rand(images.shape, generator=draw(SEED, purpose, at))
    return (chances < images.float() / 255).to(torch.uint8) * 255


def visits(images: Tensor, start: int = 0) -> Iterator[Images]:
    """Batches for ever, each pass in another order."""
    at, none = start, torch.full((BATCH,), -1)
    while True:
        for chosen in torch.randperm(len(images), generator=draw(SEED, "order", at)).split(BATCH):
            if len(chosen) == BATCH:
                yield Images(binarised(images[chosen], "binarised", at), none, none, np.zeros(BATCH, "S1"), at)
                at += BATCH


def settings(images: int, **vae: Any) -> TrainingConfig:
    """Adam as in the paper, (0.9, 0.999) and an epsilon of 1e-4; its rate falls from 2e-3 to 0."""
    rate = [[0, 2e-3], [images, 0.0]]
    return TrainingConfig.model_validate({
        "family": "vae", "images": images, "batch": BATCH, "precision": "fp32", "engine": {"kind": "torch"},
        "generator": {"model": "mlp", "channels": 200, "mlp": {"layers": 2}, "latent_dim": 50, "lr": rate,
                      "betas": [0.9, 0.999], "eps": 1e-4},
        "ema_halflife_images": images / 50, "vae": {"reconstruction": "bernoulli", **vae}})


def trained(config: TrainingConfig, images: Tensor, say: bool = False) -> Autoencoder:
    """The averaged network after ``config.images`` of the images, uint8 (N, C, H, W)."""
    shape = tuple(images.shape[1:])
    network = make_networks(config, shape, SEED)["generator"]
    engine = make_engine("generator", network, config.generator, config.engine, World(), batch=BATCH)
    state = State({"generator": engine}, {"generator": make_average(engine)})
    plan = Plan(until=config.images, batch=BATCH, seed=SEED, latent_dim=config.generator.latent_dim,
                lr={"generator": config.generator.lr}, weights=config.weights(), precision=config.precision,
                ema_halflife_images=config.ema_halflife_images, report_every_images=max(config.images // 10, BATCH))

    def report(state: State, metrics: dict[str, float]) -> None:
        if say:
            print(f"{state.images:>9} images  {FAMILIES['vae'].line(metrics)}  {metrics['images_per_second']:.0f} images/s",
                  flush=True)

    train(state, FAMILIES["vae"].phases(config, config.augmentation), visits(images), plan, report=report)
    averaged = make_networks(config, shape, SEED)["generator"]
    load_weights(averaged, whole_average(state.averages["generator"], engine), what="the average")
    assert isinstance(averaged, Autoencoder)
    return averaged.eval()


@torch.no_grad()
def elbos(network: Autoencoder, images: Tensor) -> Tensor:
    """The evidence lower bound of each image, (N,), uint8 (N, C, H, W), by one code each and the divergence in closed form."""
    found = []
    for at, part in enumerate(to_signed(images).split(CHUNK)):
        posterior = Posterior(*network.encode(part))
        noise = torch.randn(1, *posterior.mean.shape, generator=draw(SEED, "elbo", at)).to(part.device)
        nll = LIKELIHOODS["bernoulli"].nll(network.decode(sample_posterior(posterior, noise)[0])[None], part, 1.0)[0]
        found.append(-nll - gaussian_kl(posterior).sum(1))
    return torch.cat(found)


@torch.no_grad()
def log_likelihoods(network: Autoencoder, images: Tensor, samples: int) -> Tensor:
    """The importance-weighted estimate of log p(x) of each image, (N,), with ``samples`` codes drawn of its posterior."""
    found = []
    for at, image in enumerate(to_signed(images)):
        posterior = Posterior(*network.encode(image[None]))
        noise = torch.randn(samples, 1, posterior.mean.shape[1], generator=draw(SEED, "importance", at)).to(image.device)
        z = sample_posterior(posterior, noise)
        nll = torch.cat([LIKELIHOODS["bernoulli"].nll(network.decode(part[:, 0])[:, None], image[None], 1.0)
                         for part in z.split(CHUNK)])
        found.append(importance_bound(log_prior_over_posterior(posterior, z) - nll))
    return torch.cat(found)


def scores(network: Autoencoder, test: Tensor, nll_images: int, nll_samples: int) -> dict[str, float]:
    """Of the test images: the ELBO of all; the negative log-likelihood, by importance samples for ``nll_images`` of them.

    Where these are not all, ``nll`` is that of all as -ELBO of all and the mean gap on the chosen ones, which varies much less
    from digit to digit than a likelihood does; ``nll_error`` is its standard error for want of the others.
    """
    bounds = elbos(network, test)
    chosen = torch.randperm(len(test), generator=draw(SEED, "nll images", 0))[:nll_images]
    likelihoods = log_likelihoods(network, test[chosen], nll_samples)
    gap = likelihoods - bounds[chosen]
    error = float(gap.std() / len(chosen)**0.5) if len(chosen) < len(test) else 0.0
    return {"elbo": float(bounds.mean()), "nll": float(-bounds.mean() - gap.mean()), "nll_error": error,
            "nll_of_the_chosen": float(-likelihoods.mean())}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.science.vae", description="VAE on binarised MNIST.")
    parser.add_argument("--epochs", type=int, default=50, help="passes over the 60,000 digits; the paper has 3,280")
    parser.add_argument("--bound", default="elbo", help="elbo, or importance for an IWAE")
    parser.add_argument("--samples", type=int, default=1, help="codes of each image in training")
    parser.add_argument("--nll-images", type=int, default=1000, help="test digits whose likelihood is estimated")
    parser.add_argument("--nll-samples", type=int, default=5000, help="importance samples of each")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    digits = {part: torch.from_numpy(images.copy())[:, None] for part, (images, _) in read_images(get_archive(ARCHIVE)).items()}
    began = time.monotonic()
    config = settings(options.epochs * len(digits["train"]), bound=options.bound, samples=options.samples)
    network = trained(config, digits["train"], say=True)
    spent = time.monotonic() - began
    found = scores(network, binarised(digits["test"], "test", 0), options.nll_images, options.nll_samples)
    scored = time.monotonic() - began - spent
    print(f"{options.epochs} epochs: test ELBO {found['elbo']:.2f}, NLL {found['nll']:.2f} +- {found['nll_error']:.2f} nats; "
          f"{spent:.0f} s of training, {scored:.0f} s of scoring")
    if options.out:
        asked = {name: value for name, value in vars(options).items() if name != "out"}
        options.out.write_text(json.dumps({**asked, **found, "training_s": spent, "scoring_s": scored}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
