"""Path length: how far the image moves, in features, when the latent does (Karras et al. 2019, section 4.1)."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from data_shards.errors import UserError
from training.draws import generator as draw
from training.metrics.features import FeatureNet

EPSILON = 1e-3
TRIM = 0.01  # share left out at either end, as in the paper's code


@torch.inference_mode()
def path_length(generate: Callable[[Tensor], Tensor], net: FeatureNet, latent_dim: int, *, seed: int, samples: int = 500,
                epsilon: float = EPSILON, batch: int = 50) -> float:
    """E[ |f(G(slerp(z1, z2; t + epsilon))) - f(G(slerp(z1, z2; t)))|^2 / epsilon^2 ] with t uniform in [0, 1] (eq. 2).

    f is the contract's feature net where the paper takes LPIPS, so values compare only under one contract and not with
    published ones. epsilon is 1e-3 and not 1e-4, since squared differences of float32 features lose half their digits.
    The images are not rounded to 256 steps: most would not change.

    Args:
        generate: latents (n, latent_dim) -> float images (n, C, H, W), about [-1, 1].
        net: the feature net.
        latent_dim: z ~ N(0, I), the ends of each path.
        seed: of the latents.
        samples: points on as many paths, >= 2.
        epsilon: step along the path, over 0 and at most 0.1.
        batch: points at once.

    Returns:
        The mean over the points without the largest and smallest 1 %; >= 0, and small for a smooth map.

    Raises:
        UserError: arguments out of range, or a feature that is not finite.
    """
    if samples < 2 or not 0 < epsilon <= 0.1:
        raise UserError(f"samples={samples} and epsilon={epsilon} measure no path; give 2 or more, and a step such as 0.001.")
    random = draw(seed, "path length", 0)
    ends = torch.randn(2, samples, latent_dim, generator=random)
    t = torch.rand(samples, 1, generator=random) * (1 - epsilon)
    lengths = []
    for a, b, at in zip(*(part.split(batch) for part in (ends[0], ends[1], t)), strict=True):
        here, there = (net.apply((generate(slerp(a, b, s)).float().clamp(-1, 1) + 1) * 127.5).double()
                       for s in (at, at + epsilon))
        lengths.append(((there - here) / epsilon).square().sum(dim=1).cpu())
    found = torch.cat(lengths).numpy()
    if not np.isfinite(found).all():
        raise UserError("The path length is not finite; look at the generator's output for non-finite pixels.")
    low, high = np.quantile(found, [TRIM, 1 - TRIM])
    return float(found[(found >= low) & (found <= high)].mean())


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Spherical interpolation of latents (Shoemake 1985; for latents White 2016): a at t = 0, b at t = 1.

    Args:
        a, b: (n, d), not zero.
        t: (n, 1).
    """
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1, eps=1e-12)[:, None].clamp(-1 + 1e-7, 1 - 1e-7)
    omega = cosine.acos()
    return (torch.sin((1 - t) * omega) * a + torch.sin(t * omega) * b) / torch.sin(omega)
