"""Modes captured and the divergence of their mix, at its known values."""

import math

import pytest
import torch

from data_shards.errors import UserError
from training.metrics.modes import label_modes, mixture_modes


def test_a_perfect_sampler_scores_the_floor() -> None:
    """26,000 images over 1,000 modes: all captured, KL = (K - 1)/2N = 0.0192."""
    labels = torch.randint(1000, (26_000,), generator=torch.Generator().manual_seed(0))
    found = label_modes(labels, torch.ones(1000))
    assert found["modes"] == found["modes_tenth"] == found["modes_total"] == 1000
    assert found["mode_kl"] == pytest.approx(999 / 52_000, rel=0.1)
    assert found["mode_kl_excess"] == pytest.approx(0, abs=0.002)


def test_only_some_of_the_modes() -> None:
    found = label_modes(torch.arange(100).repeat(10), torch.ones(1000))
    assert found["modes"] == 100 and found["mode_kl"] == pytest.approx(math.log(10))
    assert found["mode_kl_excess"] == pytest.approx(math.log(10) - 999 / 2000)
    uneven = label_modes(torch.tensor([0, 0, 0, 1]), torch.tensor([3.0, 1.0]))
    assert uneven["mode_kl"] == pytest.approx(0, abs=1e-12)
    by_hand = label_modes(torch.tensor([0, 1, -1, -1]), torch.tensor([3.0, 1.0]))
    assert by_hand["mode_kl"] == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    rare = label_modes(torch.tensor([0] * 99 + [1]), torch.ones(2))
    assert rare["modes"] == 2 and rare["modes_tenth"] == 1


def test_two_dimensional_mixture() -> None:
    angle = torch.arange(8) * math.pi / 4
    ring, generator = torch.stack([angle.cos(), angle.sin()], 1), torch.Generator().manual_seed(0)
    points = ring[torch.randint(8, (50_000,), generator=generator)] + 0.01 * torch.randn(50_000, 2, generator=generator)
    found = mixture_modes(points, ring, 0.01)
    assert found["modes"] == 8
    assert found["high_quality"] == pytest.approx(1 - math.exp(-4.5), abs=0.0015)
    assert mixture_modes(ring[:3].repeat(10, 1), ring, 0.01)["mode_kl"] == pytest.approx(math.log(8 / 3))
    nothing = mixture_modes(ring + 5, ring, 0.01)
    assert nothing["modes"] == 0 and nothing["high_quality"] == 0 and nothing["mode_kl"] is None
    mixed = torch.cat([ring[:1].repeat(30, 1), ring[1:2].repeat(70, 1), ring[:1] + 9])
    assert mixture_modes(mixed, ring[:2], 0.01, torch.tensor([0.3, 0.7]))["mode_kl"] == pytest.approx(0, abs=1e-12)


def test_errors() -> None:
    with pytest.raises(UserError, match="positive"):
        label_modes(torch.tensor([0, 1]), torch.tensor([1.0, 0.0]))
    for labels in (torch.tensor([2]), torch.tensor([-1]), torch.tensor([-2, 0]), torch.zeros(0, dtype=torch.int64)):
        with pytest.raises(UserError, match=r"numbers in 0\.\.1"):
            label_modes(labels, torch.ones(2))
    with pytest.raises(UserError, match="do not fit"):
        mixture_modes(torch.zeros(3, 2), torch.zeros(4, 3), 1.0)
