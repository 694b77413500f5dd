"""The VAE benchmark: its estimates on a model whose likelihood is known, and its training in short."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from benchmarks.science.vae import BATCH, binarised, elbos, log_likelihoods, scores, settings, trained, visits
from training.models.autoencoder import Autoencoder


def drawings(count: int) -> Tensor:
    """Grey bars at two places of 6 x 6 pixels, (count, 1, 6, 6)."""
    images = torch.zeros(count, 1, 6, 6, dtype=torch.uint8)
    images[::2, :, 1:3], images[1::2, :, :, 3:5] = 230, 230
    return images


def network(bias: float = 0.3) -> Autoencoder:
    """Every code decodes to the same logits, so that log p(x) is known; q(z | x) depends on x all the same, and is near enough
    to the prior for weights of a small variance."""
    made = trained(settings(BATCH), drawings(BATCH))
    with torch.no_grad():
        made.encoder.moments.weight *= 0.3
    output = made.decoder.output
    assert isinstance(output, nn.Linear)
    nn.init.zeros_(output.weight)
    nn.init.constant_(output.bias, bias)
    return made


def test_the_likelihood_of_a_decoder_that_ignores_its_code() -> None:
    images, made = binarised(drawings(6), "test", 0), network()
    white = (images == 255).flatten(1).sum(1)
    chance = torch.tensor(0.3).sigmoid()
    expected = white * chance.log() + (36 - white) * (1 - chance).log()
    torch.testing.assert_close(log_likelihoods(made, images, 7000), expected, rtol=0, atol=0.05)
    bounds = elbos(made, images)
    assert bool((bounds < expected).all())


def test_the_estimate_of_all_from_some_is_that_of_all() -> None:
    images, made = binarised(drawings(40), "test", 0), network()
    every, some = scores(made, images, 40, 500), scores(made, images, 10, 500)
    assert every["nll"] == pytest.approx(every["nll_of_the_chosen"], rel=1e-5)
    assert every["nll_error"] == 0.0 < some["nll_error"]
    assert abs(some["nll"] - every["nll"]) < 4 * some["nll_error"] + 0.02
    assert abs(some["nll"] - every["nll"]) < abs(some["nll_of_the_chosen"] - every["nll"])


def test_pixels_are_drawn_anew_at_each_visit_by_their_grey_value() -> None:
    grey = torch.full((100, 1, 6, 6), 51, dtype=torch.uint8)
    first, second = itertools.islice(visits(grey), 2)
    assert set(first.images.unique().tolist()) == {0, 255}
    assert not torch.equal(first.images, second.images)
    assert float((first.images == 255).float().mean()) == pytest.approx(0.2, abs=0.03)


def test_training_raises_the_bound_of_unseen_images() -> None:
    test = binarised(drawings(60), "test", 0)
    short, longer = (elbos(trained(settings(steps * BATCH), drawings(600)), test).mean() for steps in (2, 120))
    entropy = 12 * (0.902 * -torch.tensor(0.902).log() + 0.098 * -torch.tensor(0.098).log()) + torch.tensor(2.0).log()
    assert longer > short + 5
    assert longer < -entropy + 0.8  # nothing can be better, but for the noise of these sixty
    assert longer > -entropy - 5
