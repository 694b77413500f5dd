"""Weights of layers as matrices whose rows are kernels, one per output channel; and parametrizations of them, merged."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize

from data_shards.errors import UserError
from training.families import Networks
from training.models.style import ModulatedConv

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, ModulatedConv)


def layers_of(network: nn.Module) -> dict[str, nn.Module]:
    """The convolutions and linear layers of a network, each with a ``weight``, by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, LAYERS)}


def weight_of(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def is_transposed(layer: nn.Module) -> bool:
    """Whether the weight's second dimension, not its first, counts the output channels."""
    return isinstance(layer, nn.ConvTranspose2d)


def as_rows(weight: Tensor, transposed: bool) -> Tensor:
    """weight (O, I, ...), or (I, O, ...) of a transposed convolution -> (O, I ...)."""
    return (weight.transpose(0, 1) if transposed else weight).flatten(1)


def as_weight(rows: Tensor, like: Tensor, transposed: bool) -> Tensor:
    """The reverse of `as_rows`, shaped as the weight ``like``."""
    if transposed:
        return rows.reshape(like.transpose(0, 1).shape).transpose(0, 1)
    return rows.reshape(like.shape)


def check_layers(networks: Networks, method: str) -> None:
    """Refuse networks whose layers a method that parametrizes them cannot serve.

    Raises:
        UserError: for weights that have a parameterisation already, and for a network of other layers than these.
    """
    for name, network in networks.items():
        if any(parametrize.is_parametrized(module) for module in network.modules()):
            raise UserError(f"the method {method} gives the {name}'s weights a parameterisation, and training.{name}."
                            "spectral_norm has given them another; switch it off, or leave the method out of fanout.methods.")
        if not layers_of(network) or any(isinstance(module, nn.RNNBase) for module in network.modules()):
            raise UserError(f"the method {method} works on convolutions and linear layers, and the {name} of this family is "
                            "not made of them; leave it out of fanout.methods.")


def merged(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of the network as its family makes it: for each parametrized weight the value that it has.

    Not by `parametrize.remove_parametrizations` on a copy: a copy shares its modules' classes with the original, which would
    lose its weights.
    """
    plain = {name: value for name, value in network.state_dict().items() if "parametrizations" not in name.split(".")}
    for prefix, module in network.named_modules():
        if parametrize.is_parametrized(module):
            parametrizations = module.parametrizations
            assert isinstance(parametrizations, nn.ModuleDict)
            plain |= {f"{prefix}.{name}": getattr(module, name).detach() for name in parametrizations}
    return plain


def freeze(networks: Networks) -> None:
    """No weight of these trains."""
    for network in networks.values():
        network.requires_grad_(False)
