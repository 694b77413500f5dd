"""Scale and shift per channel (BSA, Noguchi and Harada 2019, "Image generation from small datasets via batch statistics
adaptation", section 3.1): every other weight of G stays the source's; D trains whole.

Our generators have no batch normalisation: a channel's scale multiplies its kernel, W_o (1 + gamma_o), and its shift is the
layer's bias, where it has one. What scales and shifts by itself trains as it is: affine parameters of normalisation layers and
tables of `Film`. A demodulated convolution, whose kernel's norm does not count, has its scale before it, in the affine layer
that makes its style. Unlike the paper, G learns by the family's own loss, not by latents fitted to each image, so that what
trains is all that sets it apart from full fine-tuning.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from training.config import Config
from training.families import Networks
from training.methods.kernels import as_rows, as_weight, check_layers, is_transposed, layers_of, weight_of
from training.methods.method import Adaptation, Method
from training.models.layers import Film
from training.models.style import ModulatedConv


class BsaConfig(Config):
    rate: float = Field(100.0, gt=0, description="learning rate of the channels' scales over adaptation.lr; the paper's is "
                                                 "0.03 at first, 150 times our default")


class Scaled(nn.Module):
    """W_o -> W_o (1 + rate g_o) for each output channel o."""

    def __init__(self, channels: int, rate: float, transposed: bool) -> None:
        super().__init__()
        self.rate, self.transposed = rate, transposed
        self.gain = nn.Parameter(torch.zeros(channels))

    def forward(self, weight: Tensor) -> Tensor:
        rows = as_rows(weight, self.transposed)
        return as_weight(rows * (1 + self.rate * self.gain)[:, None], weight, self.transposed)


def scale_and_shift(networks: Networks, adaptation: Adaptation) -> None:
    """Leave only scales and shifts of G's channels to train.

    Raises:
        UserError: as `check_layers`.
    """
    generator = networks["generator"]
    check_layers({"generator": generator}, "bsa")
    generator.requires_grad_(False)
    for name, parameter in generator.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    for module in generator.modules():
        if isinstance(module, Film | nn.GroupNorm):
            module.requires_grad_(True)
    for layer in layers_of(generator).values():
        if not (isinstance(layer, ModulatedConv) and layer.demodulate):
            weight, transposed = weight_of(layer), is_transposed(layer)
            scaled = Scaled(len(as_rows(weight, transposed)), adaptation.recipe.adaptation.bsa.rate, transposed)
            parametrize.register_parametrization(layer, "weight", scaled.to(weight.device))


METHOD = Method(start="pretrain", prepare=scale_and_shift, hyperparameters=("lr", "r1", "bsa.rate"))
