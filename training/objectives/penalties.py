"""Gradient penalties on the discriminator: a function of |grad_x D(x)|^2, the norm taken over each sample as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

STEP = 1e-2  # of the finite difference, in images of [-1, 1]: exact for piecewise linear networks, O(STEP^2) for smooth ones

Point = Literal["real", "fake", "between"]


class Penalty(NamedTuple):
    """``value`` of the squared gradient norms (N,) at the samples ``at``, averaged over them and weighted, joins D's loss."""

    at: Point
    value: Callable[[Tensor], Tensor]


def half_squared(squared_norms: Tensor) -> Tensor:
    return squared_norms / 2


def squared(squared_norms: Tensor) -> Tensor:
    return squared_norms


def distance_from_one(squared_norms: Tensor) -> Tensor:
    """(|grad| - 1)^2; where D is flat, and the norm has no derivative, its gradient is 0."""
    return (squared_norms.clamp_min(1e-24).sqrt() - 1).square()


PENALTIES: dict[str, Penalty] = {
    # gamma/2 E|grad D|^2 on real, and on generated samples (Mescheder et al. 2018, equations 9 and 10).
    "r1": Penalty("real", half_squared),
    "r2": Penalty("fake", half_squared),
    # lambda E|grad D|^2 on the lines between the two (Thanh-Tung et al. 2019, section 5: zero-centred, "0-GP").
    "gp0": Penalty("between", squared),
    # lambda E(|grad D| - 1)^2 there (Gulrajani et al. 2017, equation 3).
    "gp1": Penalty("between", distance_from_one),
}


def squared_gradient_norms(logits: Tensor, images: Tensor) -> Tensor:
    """|grad_x D(x)|^2 of each sample, (N,), differentiable with respect to D's weights.

    ``images`` must require grad and ``logits`` = D(``images``), one independent logit a sample.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return gradient.square().flatten(1).sum(1)


def between(real: Tensor, fake: Tensor, share: Tensor) -> Tensor:
    """Samples share x + (1 - share) G(z) on the line of each pair (Gulrajani et al. 2017, algorithm 1), shaped as ``real``.

    ``share`` is (N,) in [0, 1].
    """
    share = share.view(-1, *[1] * (real.dim() - 1))
    return share * real + (1 - share) * fake


def finite_difference_norms(discriminator: nn.Module, images: Tensor,
                            labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """D(``images``) and the values of `squared_gradient_norms`, whose gradient needs no double backward.

    With g = grad_x D(x) held fixed and u = g / |g|, the gradient of |g|^2 with respect to the weights is that of
    2 |g| (D(x + h u) - D(x - h u)) / 2h. Rectifiers keep the side of their kink that they have at x, as they do in a double
    backward: otherwise each of the few that cross it within h adds 1/h, which drowns the rest. All passes are in float32.

    Args:
        labels: classes (N,) that a conditional discriminator is told.

    Returns:
        Logits and squared norms, both (N,).
    """
    def judge(x: Tensor) -> Tensor:
        logits: Tensor = discriminator(x) if labels is None else discriminator(x, labels.repeat(len(x) // len(labels)))
        return logits

    with torch.autocast(images.device.type, enabled=False):
        weights = [p for p in discriminator.parameters() if p.requires_grad]
        inputs = images.detach().float().requires_grad_(True)
        for weight in weights:
            weight.requires_grad_(False)
        try:
            (gradient,) = torch.autograd.grad(judge(inputs).sum(), inputs)
        finally:
            for weight in weights:
                weight.requires_grad_(True)
        norms = gradient.flatten(1).norm(dim=1)
        shift = gradient * (STEP / norms.clamp_min(1e-30)).view(-1, *[1] * (gradient.dim() - 1))
        inputs = inputs.detach()
        with _HeldKinks(parts=3):
            logits, above, below = judge(torch.cat([inputs, inputs + shift, inputs - shift])).chunk(3)
    slope = (above - below) / (2 * STEP)
    # The value is exact; the difference gives the gradient only.
    return logits, norms.square() + 2 * norms * (slope - slope.detach())


class _HeldKinks(TorchFunctionMode):
    """While active, a rectifier takes the slopes that it has on the first of the batch's ``parts`` for all of them."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.parts = parts

    def __torch_function__(self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in (functional.leaky_relu, functional.relu, torch.relu):
            return func(*args, **kwargs)
        values: Tensor = args[0]
        slope = 0.0
        if func is functional.leaky_relu:
            slope = args[1] if len(args) > 1 else kwargs.get("negative_slope", 0.01)
        first = values.detach()[:len(values) // self.parts]
        slopes = torch.where(first > 0, 1.0, slope).to(values.dtype)
        return values * slopes.repeat(self.parts, *[1] * (values.dim() - 1))
