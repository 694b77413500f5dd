"""Families so small that their meta-gradients can be written down, and inner loops over them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from data_shards import Batch as Images
from training.families import Batch, Family, Networks, Phase, Terms
from training.loop import Plan
from training.meta import Inner
from training.optimizers import OptimizerConfig


class Point(nn.Module):
    """Two weights, "body" and "head"; as a generator it paints their sum (and a little of z) on every pixel."""

    def __init__(self, body: float = 0.5, head: float = -1.0, shape: tuple[int, ...] = (1, 1, 1)) -> None:
        super().__init__()
        self.body, self.head = nn.Parameter(torch.tensor([body])), nn.Parameter(torch.tensor([head]))
        self.shape = shape

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        pixels = (self.body + self.head).tanh() + 0.01 * z[:, 0]
        return pixels.view(-1, *[1] * len(self.shape)).expand(-1, *self.shape)


def nearness(networks: Networks, batch: Batch) -> Terms:
    """((body - c)^2 + 2 (head + c)^2) / 2 with the images' mean c: of curvature 1 in body and 2 in head."""
    point, centre = networks["generator"], batch.images.mean()
    assert isinstance(point, Point)
    loss = ((point.body - centre).square() / 2 + (point.head + centre).square()).sum()
    return {"total": loss, "adversarial": loss.detach()}


ONE_NETWORK = Family(names=("generator",), networks=lambda config, shape: {"generator": Point(shape=shape)},
                     phases=lambda config, augmentation: [Phase("generator", nearness)],
                     shown={"loss": "generator/adversarial"})


def images(*grays: int) -> Images:
    """A batch of one-pixel images."""
    count = len(grays)
    return Images(torch.tensor(grays, dtype=torch.uint8).view(count, 1, 1, 1), torch.zeros(count, dtype=torch.int64),
                  torch.zeros(count, dtype=torch.int64), np.zeros(count, "S1"), count)


def centre_of(gray: int) -> float:
    return gray / 127.5 - 1


def inner_loop(networks: Networks, phases: Sequence[Phase], support: Images, query: Images, *, steps: int, lr: float,
               optimizer: str = "sgd", parts: Sequence[str] = ("*",), latent_dim: int = 1,
               weights: Mapping[str, float] | None = None) -> Inner:
    """The same support batch in each step."""
    plan = Plan(until=steps * len(support.labels), batch=len(support.labels), seed=3, latent_dim=latent_dim,
                lr=dict.fromkeys(networks, lr), weights=weights or {}, ema_halflife_images=0.0)
    config = OptimizerConfig(name=optimizer, betas=(0.0, 0.99 if optimizer == "adam" else 0.0))
    return Inner(networks, phases, plan, dict.fromkeys(networks, config), parts, itertools.repeat(support), iter([query]),
                 len(query.labels))
