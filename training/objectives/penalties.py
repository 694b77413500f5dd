"""Gradient penalties on the discriminator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

STEP = 1e-2  # of the finite difference, in images of [-1, 1]: exact for piecewise linear networks, O(STEP^2) for smooth ones


def squared_gradient_norms(logits: Tensor, images: Tensor) -> Tensor:
    """|grad_x D(x)|^2 of each sample, (N,), differentiable with respect to D's weights.

    R1 and R2 are gamma/2 times its mean over real and generated images (Mescheder et al. 2018, equation 9).
    ``images`` must require grad and ``logits`` = D(``images``), one independent logit a sample.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.float().square().flatten(1).sum(1)


def finite_difference_norms(discriminator: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """D(``images``) and the values of `squared_gradient_norms`, whose gradient needs no double backward.

    With g = grad_x D(x) held fixed and u = g / |g|, the gradient of |g|^2 with respect to the weights is that of
    2 |g| (D(x + h u) - D(x - h u)) / 2h. Rectifiers keep the side of their kink that they have at x, as they do in a double
    backward: otherwise each of the few that cross it within h adds 1/h, which drowns the rest. All passes are in float32.

    Returns:
        Logits and squared norms, both (N,).
    """
    with torch.autocast(images.device.type, enabled=False):
        weights = [p for p in discriminator.parameters() if p.requires_grad]
        inputs = images.detach().float().requires_grad_(True)
        for weight in weights:
            weight.requires_grad_(False)
        try:
            (gradient,) = torch.autograd.grad(discriminator(inputs).sum(), inputs)
        finally:
            for weight in weights:
                weight.requires_grad_(True)
        norms = gradient.flatten(1).norm(dim=1)
        shift = gradient * (STEP / norms.clamp_min(1e-30)).view(-1, *[1] * (gradient.dim() - 1))
        inputs = inputs.detach()
        with _HeldKinks(parts=3):
            logits, above, below = discriminator(torch.cat([inputs, inputs + shift, inputs - shift])).chunk(3)
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
