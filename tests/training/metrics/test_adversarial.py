"""The adversarial score: one half for equal distributions, more for a difference that no linear rule sees."""

import pytest
import torch

from data_shards.errors import UserError
from training.metrics.adversarial import adversarial_accuracy


def normal(n: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return scale * torch.randn(n, 16, generator=torch.Generator().manual_seed(seed)) + shift


def test_equal_distributions_cannot_be_told_apart() -> None:
    """20 independent pairs of 200: a standard error of 0.5/sqrt(8000) = 0.006, and more since folds share images."""
    found = [adversarial_accuracy(normal(200, 2 * s), normal(200, 2 * s + 1), seed=s) for s in range(20)]
    assert sum(found) / 20 == pytest.approx(0.5, abs=0.03)
    assert all(0.38 < one < 0.62 for one in found)


def test_differences_are_told() -> None:
    assert adversarial_accuracy(normal(100, 0, shift=5), normal(100, 1), seed=0) == 1.0
    assert adversarial_accuracy(normal(200, 0, scale=1.5), normal(200, 1), seed=0) > 0.8, "a scale alone has no linear rule"
    gaps = [adversarial_accuracy(normal(200, 0, shift=s), normal(200, 1), seed=0) for s in (0.1, 0.3, 0.6)]
    assert gaps == sorted(gaps)


def test_unlike_counts_do_not_move_it() -> None:
    found = [adversarial_accuracy(normal(40, 2 * s), normal(360, 2 * s + 1), seed=s) for s in range(20)]
    assert sum(found) / 20 == pytest.approx(0.5, abs=0.05)


def test_an_image_is_not_judged_by_a_machine_that_saw_it() -> None:
    """Wide features and few images: a machine tested on its own training set would be right always."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 400, generator=generator), torch.randn(30, 400, generator=generator)
    assert adversarial_accuracy(x, y, seed=0) < 0.75


def test_errors() -> None:
    with pytest.raises(UserError, match="at least 5"):
        adversarial_accuracy(normal(4, 0), normal(9, 1), seed=0)
    with pytest.raises(UserError, match="folds=1"):
        adversarial_accuracy(normal(9, 0), normal(9, 1), seed=0, folds=1)
