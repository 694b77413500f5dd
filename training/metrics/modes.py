"""Modes captured, and how far the generated mix of modes is from the true one, where modes are known."""

import numpy as np
import torch
from torch import Tensor

from data_shards.errors import UserError

HIGH_QUALITY = 3.0  # standard deviations from its mode's centre within which a point counts


def label_modes(labels: Tensor, mix: Tensor) -> dict[str, float | int]:
    """How many modes the generated labels hold, and their divergence from the true mix.

    KL(generated || true) over the modes, in nats, is what Srivastava et al. 2017 (VEEGAN) and PacGAN quote for stacked
    MNIST. A perfect sampler of N images does not score 0 but about (K - 1)/2N, the floor of a counted histogram.

    Args:
        labels: int64 (N,), each image's mode in [0, K); -1 for one that belongs to none and is not counted.
        mix: (K,), the true proportions or counts, all > 0.

    Returns:
        modes: how many of the K occur at all; modes_tenth: how many have at least a tenth of their fair share;
        mode_kl >= 0, and mode_kl_excess, the same less the floor; all of them over the images that were counted.

    Raises:
        UserError: no mode, a true proportion of 0, a label out of range, or no image that counts.
    """
    p = mix.detach().cpu().double().numpy()
    if p.ndim != 1 or len(p) < 2 or not (p > 0).all() or not np.isfinite(p).all():
        raise UserError("The true mix of modes must be two or more positive proportions; leave out modes that do not occur.")
    found = labels.detach().cpu().numpy()
    if found.ndim != 1 or len(found) == 0 or found.min() < -1 or found.max() >= len(p) or found.max() < 0:
        raise UserError(f"The modes of {len(found)} generated images are not numbers in 0..{len(p) - 1} with at least one "
                        "that counts; look at what labels them.")
    counts = np.bincount(found[found >= 0], minlength=len(p))
    q, p = counts / counts.sum(), p / p.sum()
    kl = float((q[q > 0] * np.log(q[q > 0] / p[q > 0])).sum())
    return {"modes": int((counts > 0).sum()), "modes_tenth": int((q >= p / 10).sum()), "modes_total": len(p),
            "mode_kl": max(0.0, kl), "mode_kl_excess": kl - (len(p) - 1) / (2 * int(counts.sum()))}


def mixture_modes(points: Tensor, centres: Tensor, sigma: float, mix: Tensor | None = None
                  ) -> dict[str, float | int | None]:
    """The same for points of a mixture of isotropic Gaussians, as in the 2-D tables of PacGAN (Lin et al. 2018, section 4.1).

    A point belongs to its nearest centre and counts if it lies within `HIGH_QUALITY` sigma of it.

    Args:
        points: (N, d).
        centres: (K, d).
        sigma: standard deviation of each mode, > 0.
        mix: (K,), proportions; equal ones if None.

    Returns:
        As `label_modes`, and high_quality in [0, 1], the share of points that count: 1 - exp(-4.5) = 0.989 for a perfect
        sampler in two dimensions. Where no point counts: modes 0, and the divergences are None.

    Raises:
        UserError: shapes that do not fit, or sigma not over 0.
    """
    if points.ndim != 2 or centres.ndim != 2 or points.shape[1] != centres.shape[1] or not sigma > 0 or len(points) == 0:
        raise UserError(f"Points {tuple(points.shape)}, centres {tuple(centres.shape)} and sigma {sigma} do not fit together; "
                        "give (N, d), (K, d) and a sigma over 0.")
    nearest = torch.cdist(points.double(), centres.double()).min(dim=1)
    labels = torch.where(nearest.values <= HIGH_QUALITY * sigma, nearest.indices, -1)
    share = float((labels >= 0).double().mean())
    if share == 0:
        return {"modes": 0, "modes_tenth": 0, "modes_total": len(centres), "mode_kl": None, "mode_kl_excess": None,
                "high_quality": 0.0}
    equal = torch.ones(len(centres))
    return {**label_modes(labels, equal if mix is None else mix), "high_quality": share}
