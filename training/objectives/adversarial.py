"""Adversarial losses. Logits are (N,); sample i of the real batch is paired with sample i of the generated one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import relu, softplus

Loss = Callable[[Tensor, Tensor], Tensor]


class Objective(NamedTuple):
    """``discriminator(real, fake)`` and ``generator(real, fake)``: scalars to be minimised.

    ``margin(real, fake)``, (N,), is positive where D takes a real sample for real; None where D does not decide at all.
    ``paired``: G's loss too needs the real logits.
    """

    discriminator: Loss
    generator: Loss
    margin: Loss | None
    paired: bool = False


def _real_logit(real: Tensor, fake: Tensor) -> Tensor:
    return real


# Relativistic pairing: E[f(D(G(z)) - D(x))] with f(t) = -log(1 + exp(-t)) (Huang et al. 2024, R3GAN, equation 2).
relativistic = Objective(
    discriminator=lambda real, fake: softplus(fake - real).mean(),
    generator=lambda real, fake: softplus(real - fake).mean(),
    margin=lambda real, fake: real - fake,
    paired=True,
)

# Minimax: E[log D(x)] + E[log(1 - D(G(z)))], D = sigmoid of the logit (Goodfellow et al. 2014, equation 1). Where D is sure
# of itself G gets no gradient.
minimax = Objective(
    discriminator=lambda real, fake: (softplus(fake) + softplus(-real)).mean(),
    generator=lambda real, fake: -softplus(fake).mean(),
    margin=_real_logit,
)

# Non-saturating logistic loss (Goodfellow et al. 2014, section 3).
non_saturating = Objective(
    discriminator=minimax.discriminator,
    generator=lambda real, fake: softplus(-fake).mean(),
    margin=_real_logit,
)

# Least squares with the targets 0 (generated), 1 (real) and 1 (what G wants) (Mao et al. 2017, equations 2 and 9).
least_squares = Objective(
    discriminator=lambda real, fake: ((real - 1).square() + fake.square()).mean() / 2,
    generator=lambda real, fake: (fake - 1).square().mean() / 2,
    margin=lambda real, fake: real - 0.5,
)

# Wasserstein distance by Kantorovich duality (Arjovsky et al. 2017, equations 2 and 3). D must be kept Lipschitz: with gp1
# this is WGAN-GP (Gulrajani et al. 2017).
wasserstein = Objective(
    discriminator=lambda real, fake: (fake - real).mean(),
    generator=lambda real, fake: -fake.mean(),
    margin=None,
)

# Hinge loss (Lim and Ye 2017; Miyato et al. 2018, equations 16 and 17).
hinge = Objective(
    discriminator=lambda real, fake: (relu(1 - real) + relu(1 + fake)).mean(),
    generator=lambda real, fake: -fake.mean(),
    margin=_real_logit,
)
