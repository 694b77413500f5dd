"""Inception score of any classifier's probabilities (Salimans et al. 2016), finite under collapse too."""

import torch
from torch import Tensor

from data_shards.errors import UserError


def inception_score(probabilities: Tensor, splits: int = 1) -> tuple[float, float]:
    """exp of the mutual information of image and class: exp(H(mean p) - mean H(p)) (section 4 of the paper).

    Written as a difference of entropies with 0 log 0 = 0: the usual mean of p log(p / mean p) is NaN where a class has
    underflowed in all images, which is what a collapsed generator gives.

    Args:
        probabilities: (N, K) of one classifier, each row >= 0 with sum 1.
        splits: parts that are scored apart and averaged; the field's 10 need thousands of images.

    Returns:
        Mean and standard deviation (0 for one split) over the splits; each score lies in [1, K].

    Raises:
        UserError: not (N, K), rows that are no distribution, fewer images than splits.
    """
    p = probabilities.detach().to(torch.float64)
    if p.ndim != 2 or p.shape[1] < 2 or not 1 <= splits <= len(p):
        raise UserError(f"Class probabilities of shape {tuple(p.shape)} in {splits} splits give no Inception score; give "
                        "(images, classes) with at least 2 classes and one image a split.")
    if not bool(((p >= 0) & (p <= 1)).all()) or not torch.allclose(p.sum(dim=1), p.new_ones(len(p)), atol=1e-3):
        raise UserError("The class probabilities are no distributions (a row that is negative, NaN, or does not sum to 1); "
                        "give a softmax's output.")
    scores = torch.stack([(_entropy(part.mean(dim=0)) - _entropy(part).mean()).exp() for part in p.tensor_split(splits)])
    return float(scores.mean()), float(scores.std()) if splits > 1 else 0.0


def _entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(dim=-1)
