"""Low-rank adapters (LoRA, Hu et al. 2021, section 4.1, equation 3) on the convolutions and linear layers of G, a kernel being
a row of the matrix: W + scale B A with B = 0 at the start. All else of G stays the source's; D trains whole."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from training.config import Config
from training.draws import generator as draw
from training.families import Networks
from training.methods.kernels import as_rows, as_weight, check_layers, is_transposed, layers_of, weight_of
from training.methods.method import Adaptation, Method


class LoraConfig(Config):
    rank: int = Field(4, ge=1, description="rank of each layer's change; less where the layer's own is less")
    scale: float = Field(30.0, gt=0, description="factor of each layer's change, the paper's alpha over the rank")


class LowRank(nn.Module):
    """W -> W + scale B A, A (rank, J) of N(0, 1 / J), B (O, rank) of zeros."""

    def __init__(self, weight: Tensor, rank: int, scale: float, transposed: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.scale, self.transposed = scale, transposed
        outputs, inputs = as_rows(weight, transposed).shape
        rank = min(rank, outputs, inputs)
        self.down = nn.Parameter((torch.randn(rank, inputs, generator=generator) / inputs**0.5).to(weight))
        self.up = nn.Parameter(torch.zeros(outputs, rank).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + as_weight(self.scale * self.up @ self.down, weight, self.transposed)


def add_adapters(networks: Networks, adaptation: Adaptation) -> None:
    """Leave only low-rank changes of G's layers to train.

    Raises:
        UserError: as `check_layers`.
    """
    generator, config = networks["generator"], adaptation.recipe.adaptation.lora
    check_layers({"generator": generator}, "lora")
    generator.requires_grad_(False)
    for name, layer in layers_of(generator).items():
        adapter = LowRank(weight_of(layer), config.rank, config.scale, is_transposed(layer),
                          draw(adaptation.seed, f"lora {name}", 0))
        parametrize.register_parametrization(layer, "weight", adapter)


METHOD = Method(start="pretrain", prepare=add_adapters, hyperparameters=("lr", "r1", "lora.rank", "lora.scale"))
