"""FSGAN (Robb et al. 2020, "Few-shot adaptation of generative adversarial networks", section 3.2): with W = U S V^T of each
layer of G and D, its kernels as rows, only the singular values S train.

Written as W + U (S - S_source) V^T, so that the start is the source's weights bit for bit. Biases and tables stay.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from training.config import Config
from training.families import Networks
from training.methods.kernels import as_rows, as_weight, check_layers, freeze, is_transposed, layers_of, weight_of
from training.methods.method import Adaptation, Method


class FsganConfig(Config):
    rate: float = Field(10.0, gt=0, description="learning rate of the singular values over adaptation.lr; the paper's is 2e-3, "
                                                "ten times our default")


class Singular(nn.Module):
    """W -> W + U diag(rate c) V^T, where U and V are W's singular vectors."""

    def __init__(self, weight: Tensor, rate: float, transposed: bool) -> None:
        super().__init__()
        self.rate, self.transposed = rate, transposed
        u, values, vh = torch.linalg.svd(as_rows(weight.detach(), transposed), full_matrices=False)
        self.u, self.vh = nn.Buffer(u), nn.Buffer(vh)
        self.change = nn.Parameter(torch.zeros_like(values))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + as_weight((self.u * (self.rate * self.change)) @ self.vh, weight, self.transposed)


def train_singular_values(networks: Networks, adaptation: Adaptation) -> None:
    """Leave only the singular values of all layers to train.

    Raises:
        UserError: as `check_layers`: spectral normalisation, for one, holds a largest singular value at 1.
    """
    check_layers(networks, "fsgan")
    freeze(networks)
    for network in networks.values():
        for layer in layers_of(network).values():
            singular = Singular(weight_of(layer), adaptation.recipe.adaptation.fsgan.rate, is_transposed(layer))
            parametrize.register_parametrization(layer, "weight", singular)


METHOD = Method(start="pretrain", prepare=train_singular_values, hyperparameters=("lr", "r1", "fsgan.rate"))
