"""Shared layers."""

from __future__ import annotations

import pytest
import torch

from tests.training.models.make import pictures
from training.models.config import GeneratorConfig
from training.models.layers import MinibatchStd, channel_counts, halve, image_sizes, upsample


@pytest.mark.parametrize(("side", "sizes"), [(28, [7, 14, 28]), (32, [4, 8, 16, 32]), (100, [7, 13, 25, 50, 100]), (9, [5, 9])])
def test_resolutions(side: int, sizes: list[int]) -> None:
    assert image_sizes((1, side, side), "r3gan") == [(s, s) for s in sizes]
    assert channel_counts(GeneratorConfig(channels=8, growth=4), 5) == [8, 16, 32, 32, 32]


def test_halving_and_doubling_meet_every_resolution_on_the_way() -> None:
    for side in (28, 30, 33, 100):
        sizes = image_sizes((1, side, side), "r3gan")
        x = pictures(1, (1, side, side))
        for size in reversed(sizes[:-1]):
            x = halve(x)
            assert x.shape[2:] == size
        for size in sizes[1:]:
            x = upsample(x, size)
        assert x.shape[2:] == (side, side)
    torch.testing.assert_close(halve(torch.ones(1, 1, 5, 5)), torch.ones(1, 1, 3, 3))  # an edge is not darkened


def test_minibatch_deviation_by_hand() -> None:
    """Groups of samples n / group apart: with 6 samples and 3 a group, {0, 2, 4} and {1, 3, 5}."""
    x = pictures(6, (2, 3, 3))
    y = MinibatchStd(3)(x)
    assert torch.equal(y[:, :2], x)
    for first in (0, 1):
        members = x[first::2]
        deviation = ((members - members.mean(0)).square().mean(0) + 1e-8).sqrt().mean()
        torch.testing.assert_close(y[first::2, 2], deviation.expand(3, 3, 3))


def test_alternating_real_and_generated_samples_are_in_groups_of_their_own() -> None:
    """The deviation of constant generated samples is 0 beside any real ones."""
    real, fake = pictures(8, (1, 4, 4)), torch.zeros(8, 1, 4, 4)
    alternating = MinibatchStd(4)(torch.stack([real, fake], 1).flatten(0, 1))[:, 1].unflatten(0, (8, 2))
    assert float(alternating[:, 1].max()) == pytest.approx(1e-4)
    torch.testing.assert_close(alternating[:, 0], MinibatchStd(4)(real)[:, 1])
