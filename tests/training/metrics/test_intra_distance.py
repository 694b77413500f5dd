"""Intra-cluster distance by hand, a copier at 0, and the empty clusters counted."""

import pytest
import torch

from data_shards.errors import UserError
from training.metrics.intra_distance import intra_cluster_distance


def test_by_hand() -> None:
    """Around 0: fakes -1, 1 and 2, pairs 2, 3, 1; around 10: 10 and 14; around 100 none."""
    support = torch.tensor([[0.0], [10.0], [100.0]])
    fake = torch.tensor([[-1.0], [10.0], [1.0], [14.0], [2.0]])
    found = intra_cluster_distance(fake, support)
    assert found == {"intra_distance": pytest.approx((2 + 4) / 2), "empty_clusters": 1, "clusters": 3}
    assert intra_cluster_distance(fake, support, members=2)["intra_distance"] == pytest.approx((2 + 4) / 2)
    lone = torch.tensor([[-1.0], [1.0], [10.0], [3.0]])
    assert intra_cluster_distance(lone, support)["intra_distance"] == pytest.approx((2 + 4 + 2) / 3)


def test_a_copier_scores_zero_and_a_collapsed_one_leaves_clusters_empty() -> None:
    generator = torch.Generator().manual_seed(0)
    support = torch.randn(10, 8, generator=generator)
    copies = support[torch.randint(10, (200,), generator=generator)]
    assert intra_cluster_distance(copies, support)["intra_distance"] == 0
    fresh = intra_cluster_distance(torch.randn(200, 8, generator=generator), support)
    assert fresh["intra_distance"] > 2
    collapsed = intra_cluster_distance(support[:1] + 0.01 * torch.randn(200, 8, generator=generator), support)
    assert collapsed["empty_clusters"] == 9 and 0 < collapsed["intra_distance"] < 0.1


def test_errors() -> None:
    with pytest.raises(UserError, match="more images"):
        intra_cluster_distance(torch.randn(5, 2), torch.randn(5, 2))
