"""Gradient penalties on the discriminator."""

from __future__ import annotations

import torch
from torch import Tensor


def squared_gradient_norms(logits: Tensor, images: Tensor) -> Tensor:
    """|grad_x D(x)|^2 of each sample, (N,), differentiable with respect to D's weights.

    R1 and R2 are gamma/2 times its mean over real and generated images (Mescheder et al. 2018, equation 9).
    ``images`` must require grad and ``logits`` = D(``images``), one independent logit a sample.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.float().square().flatten(1).sum(1)
