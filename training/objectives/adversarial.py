"""Adversarial losses. Logits are (N,); sample i of the real batch is paired with sample i of the generated one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import relu, softplus


class Objective(NamedTuple):
    """``discriminator(real, fake)`` and ``generator(real, fake)``: scalars to be minimised."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor, Tensor], Tensor]


# Relativistic pairing: E[f(D(G(z)) - D(x))] with f(t) = -log(1 + exp(-t)) (Huang et al. 2024, R3GAN, equation 2).
relativistic = Objective(
    discriminator=lambda real, fake: softplus(fake - real).mean(),
    generator=lambda real, fake: softplus(real - fake).mean(),
)

# Non-saturating logistic loss (Goodfellow et al. 2014, section 3).
non_saturating = Objective(
    discriminator=lambda real, fake: (softplus(fake) + softplus(-real)).mean(),
    generator=lambda real, fake: softplus(-fake).mean(),
)

# Hinge loss (Lim and Ye 2017; Miyato et al. 2018, equations 16 and 17).
hinge = Objective(
    discriminator=lambda real, fake: (relu(1 - real) + relu(1 + fake)).mean(),
    generator=lambda real, fake: -fake.mean(),
)
