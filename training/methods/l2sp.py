"""L2-SP (Li, Grandvalet and Davoine 2018, section 3): fine-tuning that is drawn back to its starting point,
lambda |theta_G - theta_G^s|^2 + mu |theta_D - theta_D^s|^2, each a sum over all weights of the network.

The paper writes alpha / 2 and has a second term for a new head; here nothing is new, and the published alpha = 0.01 is a weight
of 0.005. FreezeD's code has means per tensor instead, which ties a bias as tightly as a whole convolution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from training.config import Config
from training.families import Phase
from training.methods.method import Adaptation, Extra, Method, with_term


class L2spConfig(Config):
    generator: float = Field(0.005, ge=0, description="weight lambda of the generator's squared distance from its start")
    discriminator: float = Field(0.005, ge=0, description="weight mu of the discriminator's")


def squared_distance(network: nn.Module, start: Mapping[str, Tensor], importance: Mapping[str, Tensor] | None = None) -> Tensor:
    """sum_i F_i (theta_i - theta_s,i)^2 over all weights, a scalar; F = 1 without ``importance``."""
    squares = [((parameter.float() - start[name]).square() * (1.0 if importance is None else importance[name])).sum()
               for name, parameter in network.named_parameters()]
    return torch.stack(squares).sum()


def anchored(adaptation: Adaptation, network: str, importance: Mapping[str, Tensor] | None = None) -> Extra:
    """The term that draws ``network`` back to where it began."""
    start = dict(adaptation.source[network].named_parameters())
    return lambda networks, batch: squared_distance(networks[network], start, importance)


def phases(adaptation: Adaptation) -> Sequence[Phase]:
    """The family's, each network of which the section names drawn back."""
    found, config = adaptation.phases, adaptation.recipe.adaptation.l2sp
    for network in adaptation.source.keys() & L2spConfig.model_fields.keys():
        found = with_term(found, network, "l2sp", getattr(config, network), anchored(adaptation, network))
    return found


METHOD = Method(start="pretrain", phases=phases, hyperparameters=("lr", "r1", "l2sp.generator", "l2sp.discriminator"))
