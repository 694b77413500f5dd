"""All scores of one generator together, and contracts that must not be mixed."""

import json

import pytest
import torch

from data_shards.errors import UserError
from training.metrics.encoder import Encoder
from training.metrics.features import encoder_net
from training.metrics.score import contract, same_contract, score

KEYS = {
    *("kid", "kid_ci95", "fd", "fid", "precision", "recall", "density", "coverage", "intra_distance", "empty_clusters"),
    *("copy_rate", "auth_pct", "disqualified", "reason"),
}


def normal(n: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, 16, generator=torch.Generator().manual_seed(seed)) + shift


def test_scores_are_plain_and_complete() -> None:
    found = score(normal(128, 0), normal(50, 1), normal(10, 2), normal(40, 3), seed=0)
    assert set(found) == KEYS
    assert json.loads(json.dumps(found)) == found
    assert found["kid_ci95"][0] <= found["kid"] <= found["kid_ci95"][1]
    assert found["fid"] is None and found["disqualified"] is False and found["reason"] == ""
    inception = score(normal(128, 0), normal(50, 1), normal(10, 2), normal(40, 3), seed=0, net="inception")
    assert inception["fid"] == inception["fd"] == found["fd"]


def test_a_copier_is_disqualified_whatever_its_kid() -> None:
    support = normal(10, 2)
    fake = support.repeat(13, 1)[:128] + 0.01 * normal(128, 4)
    found = score(fake, normal(50, 1), support, normal(40, 3), seed=0)
    assert found["disqualified"] and found["copy_rate"] > 0.95 and found["auth_pct"] < 5
    assert "copies" in found["reason"]


def test_every_score_improves_as_the_right_data_is_mixed_in() -> None:
    right, wrong, reference = normal(200, 0), normal(200, 1, 1.5), normal(200, 2)
    rows = [
        score(torch.cat([right[:k], wrong[k:]]), reference, normal(10, 3), normal(40, 4), seed=0)
        for k in (0, 66, 132, 200)
    ]
    for key, sign in (("kid", -1), ("fd", -1), ("precision", 1), ("density", 1), ("coverage", 1)):
        values = [sign * row[key] for row in rows]
        assert values == sorted(values), key


def test_non_finite_features_are_an_error() -> None:
    fake = normal(50, 0)
    fake[3, 3] = float("nan")
    with pytest.raises(UserError, match="1 of 50 rows"):
        score(fake, normal(50, 1), normal(10, 2), normal(40, 3), seed=0)


def test_unlike_contracts_are_never_mixed() -> None:
    net = encoder_net(Encoder(1, 28, 3, 8, 16))
    mine = contract(net, "abc", 1000, 50, "0.1.0")
    assert mine["features"] == f"encoder@{net.hash[:8]}"
    same_contract(mine, dict(mine))
    for field, other in (("reference_hash", "def"), ("n_fake", 500), ("resizer", "none"), ("graft_version", "0.2.0")):
        with pytest.raises(UserError, match=field):
            same_contract(mine, {**mine, field: other})
    with pytest.raises(UserError, match="extra"):
        same_contract(mine, {**mine, "extra": 1})
