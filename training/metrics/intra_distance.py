"""Intra-cluster distance: do the generated images around each training image differ? (protocol of Ojha et al. 2021, CDC)."""

import torch
from torch import Tensor

from data_shards.errors import UserError
from training.metrics.checks import as_pair
from training.metrics.copying import nearest_support

MEMBERS = 50  # of a cluster, as in the protocol


def intra_cluster_distance(fake: Tensor, support: Tensor, *, members: int = MEMBERS) -> dict[str, float | int]:
    """Mean pairwise distance of the fakes that share a nearest support image, averaged over the clusters (section 4).

    The paper measures with LPIPS; here the distance is Euclidean in the contract's feature net, so values compare only
    under one contract. It is 0 for a generator that copies. A support image that no fake is nearest to is a missed mode;
    the published code leaves it out without a word, so their number is returned too. Of a cluster the first `members`
    fakes count; a cluster of one has no pair and does not enter the mean.

    Args:
        fake: (N, d) in the order in which they were drawn.
        support: (S, d), the training images, S < N.
        members: most fakes of a cluster, >= 2.

    Returns:
        intra_distance >= 0; empty_clusters in [0, S) and clusters = S.

    Raises:
        UserError: malformed or non-finite features, no more fakes than support images.
    """
    fake, support = as_pair(fake, support, ("fake", "support"))
    if len(fake) <= len(support) or members < 2:
        raise UserError(f"{len(fake)} generated images around {len(support)} training images with {members} members a cluster "
                        "need not share a cluster; generate more images than there are training images.")
    nearest, _ = nearest_support(fake, support)
    means, empty = [], 0
    for cluster in range(len(support)):
        own = fake[nearest == cluster][:members]
        empty += len(own) == 0
        if len(own) > 1:
            means.append(torch.nn.functional.pdist(own).mean())
    return {"intra_distance": float(torch.stack(means).mean()), "empty_clusters": empty, "clusters": len(support)}
