"""Is a picture one of the support images, pale, blurred or noisy? The half of the copy test that looks at pixels.

A feature net alone does not see this: the in-domain encoder found no copies of drawings at half contrast and 22 % of blurred
ones, and gave 21 to 49 % to generators trained on 10 drawings until the eye saw hardly anything but copies (docs/LOG.md).
Pixels alone do not see a copy that is shifted by 2 px, which the feature net finds always. So both look.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_shards.errors import UserError

SIDE = 32  # larger pictures are averaged down to it: a copy is not made of pixels
BLUR = (0.25, 0.5, 0.25)  # along both axes, twice: about 1 px
SPLITS = 200  # of the pool, where it is too small for one


class Pictures(NamedTuple):
    """The pixels behind the features: uint8 (N, C, H, W)."""

    fake: Tensor
    support: Tensor
    held_back: Tensor


def as_rows(images: Tensor) -> Tensor:
    """Pictures as unit vectors that brightness and contrast do not change.

    Args:
        images: uint8 (N, C, H, W).

    Returns:
        (N, d) float64: averaged down to SIDE, blurred, mean-free, of length 1 (of length 0 for a flat picture).
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise UserError(f"Pictures are {images.dtype} of shape {tuple(images.shape)}; give uint8 images (N, C, H, W).")
    x = images.float()
    if max(x.shape[2:]) > SIDE:
        x = F.adaptive_avg_pool2d(x, (min(SIDE, x.shape[2]), min(SIDE, x.shape[3])))
    x = x - x.mean(dim=(1, 2, 3), keepdim=True)  # before the blur, whose border is 0
    channels, kernel = x.shape[1], torch.tensor(BLUR, device=x.device)
    for _ in range(2):
        x = F.conv2d(x, kernel.view(1, 1, 1, 3).expand(channels, 1, 1, 3), padding=(0, 1), groups=channels)
        x = F.conv2d(x, kernel.view(1, 1, 3, 1).expand(channels, 1, 3, 1), padding=(1, 0), groups=channels)
    rows = x.flatten(1).double()
    return F.normalize(rows - rows.mean(dim=1, keepdim=True), eps=1e-6)


def likeness(distances: Tensor) -> Tensor:
    """Distance to the nearest support image as a share of the mean distance to the others; 0 for a copy.

    The distance alone would call a blurred mean of the class a copy, since it lies nearer to every image than two images
    lie to each other; against the other distances it stands out as little as any (Carlini et al. 2023, section 4.2).

    Args:
        distances: (N, S), S >= 2.
    """
    ordered = distances.sort(dim=1).values
    return ordered[:, 0] / ordered[:, 1:].mean(dim=1).clamp_min(1e-12)


def likeness_threshold(support: Tensor, held_back: Tensor, percentile: float) -> float:
    """The likeness below which only ``percentile`` percent of real images lie.

    Support and held-back images are one pool that was split at random; small pools are split again, always in the same
    SPLITS ways, and all likenesses of the held-back parts are taken together.

    Args:
        support, held_back: rows of `as_rows`, S >= 2 and H >= 1.
        percentile: in (0, 100).
    """
    pool = torch.cat([support, held_back])
    distances = torch.cdist(pool, pool, compute_mode="donot_use_mm_for_euclid_dist")
    generator = torch.Generator().manual_seed(0)
    orders = [torch.arange(len(pool))]
    if len(held_back) < 400:
        orders = [torch.randperm(len(pool), generator=generator) for _ in range(SPLITS)]
    found = [likeness(distances[order[len(support):]][:, order[:len(support)]]) for order in orders]
    return float(np.percentile(torch.cat(found).cpu().numpy(), percentile))


def alike(pictures: Pictures, percentile: float) -> Tensor:
    """Which fakes are more like one support image than all but ``percentile`` percent of real images are: bool (N,)."""
    fake, support, held_back = map(as_rows, pictures)
    distances = torch.cdist(fake, support, compute_mode="donot_use_mm_for_euclid_dist")
    found = likeness(distances)
    return (found < likeness_threshold(support, held_back, percentile)) | (found == 0)
