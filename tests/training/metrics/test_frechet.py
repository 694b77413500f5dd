"""Frechet distance against closed forms and torchmetrics; exact merging of moments."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.image.fid import FrechetInceptionDistance

from data_shards.errors import UserError
from training.metrics.frechet import frechet_distance, frechet_from_moments, merge_moments, moments


def normal(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whitened(n: int, d: int, seed: int) -> torch.Tensor:
    x = normal(n, d, seed)
    x = x - x.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x / (n - 1))
    return x @ vectors / values.sqrt() @ vectors.T


def test_closed_form_of_a_scaled_and_shifted_set() -> None:
    x = whitened(500, 16, 0)
    scale, shift = torch.linspace(0.2, 2.0, 16, dtype=torch.float64), torch.linspace(-1, 1, 16, dtype=torch.float64)
    expected = float(shift.square().sum() + (1 - scale).square().sum())
    assert frechet_distance(x * scale + shift, x) == pytest.approx(expected, abs=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_bias_of_two_samples_of_one_distribution() -> None:
    d, n = 64, 1000
    values = [frechet_distance(normal(n, d, 2 * s), normal(n, d, 2 * s + 1)) for s in range(6)]
    assert sum(values) / 6 == pytest.approx(2 * d / n + d * (d + 1) / (2 * n), rel=0.06)


def test_agrees_with_torchmetrics() -> None:
    class Pixels(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)

    x, y = normal(300, 12, 0) * 1.3 + 0.2, normal(300, 12, 1)
    theirs = FrechetInceptionDistance(feature=Pixels(), input_img_size=(3, 2, 2), normalize=True)
    theirs.set_dtype(torch.float64)
    theirs.update(x.reshape(-1, 3, 2, 2), real=False)
    theirs.update(y.reshape(-1, 3, 2, 2), real=True)
    assert frechet_distance(x, y) == pytest.approx(float(theirs.compute()), rel=1e-5)


def test_singular_covariances() -> None:
    few, many = normal(10, 32, 0), normal(200, 32, 1)
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(few, many) > 1
    point = torch.ones(5, 4)
    assert frechet_distance(point, point + 1) == pytest.approx(4)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 99), min_size=1, max_size=4, unique=True), offset=st.sampled_from([0.0, 1e3, 1e6]))
def test_merged_moments_are_the_moments_of_the_whole(cuts: list[int], offset: float) -> None:
    x = normal(100, 5, 0) + offset
    whole = moments(x)
    parts = [moments(part) for part in torch.tensor_split(x, sorted(cuts))]
    merged = parts[0]
    for part in parts[1:]:
        merged = merge_moments(merged, part)
    assert merged.images == 100
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-14, atol=1e-12)
    torch.testing.assert_close(merged.scatter, whole.scatter, rtol=1e-8, atol=1e-7)


def test_merging_is_stable_far_from_zero() -> None:
    """Sums of outer products lose 1e-3 at an offset of 1e6; centred ones must not."""
    x, y = normal(400, 8, 0), normal(400, 8, 1) * 1.2
    exact = frechet_distance(x, y)
    shifted = [merge_moments(moments(z[:150] + 1e6), moments(z[150:] + 1e6)) for z in (x, y)]
    far = frechet_from_moments(shifted[0].mean, shifted[0].cov, shifted[1].mean, shifted[1].cov)
    assert far == pytest.approx(exact, rel=1e-7)


def test_errors() -> None:
    with pytest.raises(UserError, match="one feature net"):
        merge_moments(moments(torch.zeros(3, 2)), moments(torch.zeros(3, 4)))
    with pytest.raises(UserError, match="at least 2 images"):
        _ = moments(torch.zeros(1, 2)).cov
    eye = torch.eye(2)
    with pytest.raises(UserError, match="do not fit"):
        frechet_from_moments(torch.zeros(2), eye, torch.zeros(3), eye)
    with pytest.raises(UserError, match="NaN"):
        frechet_from_moments(torch.zeros(2), eye * float("nan"), torch.zeros(2), eye)
