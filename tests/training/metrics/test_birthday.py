"""The birthday test recovers a known support, and its batch repeats an image in half of all cases."""

import numpy as np
import pytest
import torch

from data_shards.errors import UserError
from training.metrics.birthday import birthday_support


def normal(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


def test_a_known_support() -> None:
    images, generator = normal(1000, 0), torch.Generator().manual_seed(1)
    drawn = images[torch.randint(1000, (3000,), generator=generator)]
    found = birthday_support(drawn + 1e-4 * normal(3000, 2), normal(500, 3))
    assert found["birthday_support"] == pytest.approx(1000, rel=0.1)
    few = birthday_support(images[:10].repeat(20, 1), normal(500, 3))
    assert few["birthday_support"] == pytest.approx(200 * 199 / 2 / (10 * 190), rel=1e-9)


@pytest.mark.parametrize(("support", "batch"), [(1_000, 38), (10_000, 118)])
def test_its_batch_repeats_in_half_of_all_cases(support: int, batch: int) -> None:
    """Against simulation: of 4,000 batches of that size about half hold a pair (0.509 and 0.503)."""
    points = torch.arange(float(support))[:, None]
    drawn = points[torch.randint(support, (5000,), generator=torch.Generator().manual_seed(0))]
    found = birthday_support(drawn, points[:2])
    # The threshold of these reals is 1: neighbours count too, which makes three images alike of each.
    assert found["birthday_support"] == pytest.approx(support / 3, rel=0.1)
    exact = birthday_support(drawn, torch.zeros(2, 1))
    assert exact["birthday_batch"] == pytest.approx(batch, rel=0.05)
    rng = np.random.default_rng(0)
    repeats = np.mean([len(np.unique(rng.integers(support, size=batch))) < batch for _ in range(4000)])
    assert repeats == pytest.approx(0.5, abs=0.03)


def test_no_pair_alike_is_no_number() -> None:
    assert birthday_support(10 * normal(50, 0), normal(500, 1)) == {"birthday_support": None, "birthday_batch": None}
    with pytest.raises(UserError, match="at least 2"):
        birthday_support(normal(1, 0), normal(5, 1))
