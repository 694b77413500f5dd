"""Inception score: its two ends, agreement with torchmetrics, and a number where torchmetrics has none."""

import math

import pytest
import torch
from torchmetrics.image.inception import InceptionScore

from data_shards.errors import UserError
from training.metrics.inception_score import inception_score


def test_all_classes_and_one() -> None:
    eye = torch.eye(10).repeat(20, 1)
    assert inception_score(eye)[0] == pytest.approx(10) and inception_score(eye)[1] == 0
    assert inception_score(eye[:1].expand(200, -1))[0] == pytest.approx(1)
    assert inception_score(eye[eye.argmax(1) < 5])[0] == pytest.approx(5)
    assert inception_score(torch.full((50, 10), 0.1))[0] == pytest.approx(1)
    mean, spread = inception_score(eye, splits=10)
    assert mean == pytest.approx(10) and spread == pytest.approx(0, abs=1e-9)


def theirs(logits: torch.Tensor) -> float:
    class Logits(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1).double()

    metric = InceptionScore(feature=Logits(), splits=1)
    metric.set_dtype(torch.float64)
    metric.update(logits.reshape(len(logits), -1, 2, 2))
    return float(metric.compute()[0])


def test_agrees_with_torchmetrics() -> None:
    logits = torch.randn(200, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    assert inception_score(logits.softmax(1))[0] == pytest.approx(theirs(logits), rel=1e-5)


def test_a_collapsed_classifier_gives_no_nan() -> None:
    """One-hot float32 logits of 110: the other classes' probabilities underflow to 0 in every image."""
    logits = torch.zeros(100, 12)
    logits[:, 3] = 110.0
    probabilities = logits.softmax(1)
    assert probabilities[:, 0].max() == 0
    assert inception_score(probabilities)[0] == pytest.approx(1)
    assert not math.isnan(inception_score(probabilities, splits=10)[1])


def test_errors() -> None:
    with pytest.raises(UserError, match="no distributions"):
        inception_score(torch.randn(5, 3))
    with pytest.raises(UserError, match="no distributions"):
        inception_score(torch.full((5, 3), math.nan))
    with pytest.raises(UserError, match="splits"):
        inception_score(torch.eye(3), splits=10)
