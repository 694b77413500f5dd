"""Precision, recall, density and coverage at their known expectations, and the order of their arguments."""

import math

import pytest
import torch

from data_shards.errors import UserError
from training.metrics import prdc
from training.metrics.prdc import precision_recall_density_coverage as score_prdc


def normal(n: int, d: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_equal_distributions() -> None:
    n = m = 200
    k = 5
    values = [score_prdc(normal(n, 16, 2 * s), normal(m, 16, 2 * s + 1), k) for s in range(40)]
    coverage = 1 - math.prod((m - i) / (n + m - i) for i in range(1, k + 1))
    assert coverage == pytest.approx(0.9699, abs=1e-4)
    assert sum(v["coverage"] for v in values) / 40 == pytest.approx(coverage, abs=0.01)
    assert sum(v["density"] for v in values) / 40 == pytest.approx(1, abs=0.04)
    assert all(v["precision"] > 0.6 and v["recall"] > 0.6 for v in values)


def test_disjoint_sets_score_zero() -> None:
    scores = score_prdc(normal(50, 4, 0) + 100, normal(60, 4, 1))
    assert scores == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


def test_collapse_to_one_real_point() -> None:
    real = normal(300, 16, 0)
    scores = score_prdc(real[7].expand(300, -1) + normal(300, 16, 1, 1e-4), real)
    assert scores["precision"] == 1
    assert scores["recall"] <= 0.01
    assert scores["coverage"] < 0.1


def test_the_order_of_the_arguments_matters() -> None:
    narrow, wide = normal(300, 8, 0, 0.3), normal(300, 8, 1)
    right, swapped = score_prdc(narrow, wide), score_prdc(wide, narrow)
    assert right["precision"] > 0.95 and right["recall"] < 0.5  # fakes: all plausible, few modes
    assert swapped["precision"] == right["recall"] and swapped["recall"] == right["precision"]
    assert swapped["density"] < right["density"]


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, real = normal(70, 6, 0), normal(90, 6, 1)
    whole = score_prdc(fake, real, 3)
    monkeypatch.setattr(prdc, "_ROWS", 16)
    assert score_prdc(fake, real, 3) == whole


def test_errors() -> None:
    with pytest.raises(UserError, match="k=0"):
        score_prdc(normal(9, 2, 0), normal(9, 2, 1), 0)
    with pytest.raises(UserError, match="at least 6"):
        score_prdc(normal(5, 2, 0), normal(9, 2, 1), 5)
