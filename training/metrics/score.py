"""All scores of one generator at once, and the contract that says which scores may stand in one table."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from data_shards.errors import UserError
from training.metrics.copying import auth_pct, copy_rate, is_copier
from training.metrics.features import FeatureNet
from training.metrics.frechet import frechet_distance
from training.metrics.intra_distance import intra_cluster_distance
from training.metrics.kid import kid, kid_interval
from training.metrics.likeness import Pictures
from training.metrics.prdc import precision_recall_density_coverage

FID_NET = "inception"
SCORES_VERSION = 2  # goes up when a score of the same images changes: scores of two versions are in no one table


def score(
    fake: Tensor, reference: Tensor, support: Tensor, held_back: Tensor, *, seed: int, net: str = "", k: int = 5,
    pictures: Pictures | None = None,
) -> dict[str, Any]:
    """Score generated images against reference images that nothing was chosen on, and against the support for copying.

    Args:
        fake: features of generated images (N, d).
        reference: features of the reference images (M, d), used here only.
        support: features of the images the method was adapted to (S, d), S >= 2.
        held_back: features of the rest of the support pool (H, d).
        seed: of the interval's bootstrap.
        net: name of the feature net; only "inception" fills `fid`.
        k: neighbours of precision, recall, density and coverage; at most the smaller set's size minus 1.
        pictures: the images behind `fake`, `support` and `held_back`; without them a pale or blurred copy goes unseen.

    Returns:
        kid, kid_ci95 [lo, hi], fd, fid (None unless `net` is the FID Inception), precision, recall, density, coverage,
        intra_distance and empty_clusters (None with no more fakes than support images), copy_rate in [0, 1], auth_pct in
        [0, 100], disqualified (bool), reason (str): plain Python values, for JSON.

    Raises:
        UserError: malformed or non-finite features, or sets too small for a score.
    """
    fd = frechet_distance(fake, reference)
    rate = copy_rate(fake, support, held_back, pictures=pictures)
    disqualified, reason = is_copier(rate, len(fake))
    return {
        "kid": kid(fake, reference),
        "kid_ci95": list(kid_interval(fake, reference, seed=seed)),
        "fd": fd,
        "fid": fd if net == FID_NET else None,
        **precision_recall_density_coverage(fake, reference, k),
        **_around_support(fake, support),
        "copy_rate": rate,
        "auth_pct": auth_pct(fake, support),
        "disqualified": disqualified,
        "reason": reason,
    }


def _around_support(fake: Tensor, support: Tensor) -> dict[str, Any]:
    names = ("intra_distance", "empty_clusters")
    if len(fake) <= len(support):
        return dict.fromkeys(names)
    found = intra_cluster_distance(fake, support)
    return {name: found[name] for name in names}


def contract(net: FeatureNet, reference_hash: str, n_fake: int, n_reference: int, version: str) -> dict[str, str | int]:
    """What a score depends on beside the generator: two scores are comparable only if all of this is the same.

    Args:
        net: the feature net.
        reference_hash: sha256 (hex) of the reference set.
        n_fake, n_reference: images in each set; every metric's bias moves with them.
        version: of graft.

    Returns:
        A flat dict for JSON; `features` is the net's name with eight digits of its hash, as scores are labelled.
    """
    return {
        "features": f"{net.name}@{net.hash[:8]}",
        "net": net.name,
        "net_hash": net.hash,
        "resizer": net.resizer,
        "n_fake": n_fake,
        "n_reference": n_reference,
        "reference_hash": reference_hash,
        "scores_version": SCORES_VERSION,
        "graft_version": version,
    }


def same_contract(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Let two scores be compared, or refuse.

    Raises:
        UserError: the first field in which the two contracts differ, with both values.
    """
    for field in [*a, *(field for field in b if field not in a)]:
        if a.get(field) != b.get(field):
            raise UserError(
                f"These scores cannot stand in one table: {field} is {a.get(field)!r} in one and {b.get(field)!r} in "
                "the other; score both again with `graft evaluate` under one contract."
            )
