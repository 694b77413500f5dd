"""AdAM (Zhao et al. 2022, "Few-shot image generation via adaptation-aware kernel modulation", section 4).

Importance probing: on copies of the source's networks, all kernels are modulated, W (1 + M) elementwise with a low-rank M, and
M alone is trained on the support set for a short while; the Fisher information of M then says how much a kernel matters to the
adaptation. Main adaptation, from the source's weights again: kernels above a quantile of their network are modulated, hence
kept near what the source knows, and all else is fine-tuned. The images of the probing count in the trial's budget.

A kernel's importance is the mean of (dL/dM)^2 = (W dL/dW)^2 over its entries, which does not depend on how M is factored.
"""

from __future__ import annotations

import copy

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from training.config import Config
from training.draws import generator as draw
from training.families import Networks
from training.methods.kernels import as_rows, as_weight, check_layers, freeze, is_transposed, layers_of, merged, weight_of
from training.methods.method import Adaptation, Method
from training.methods.stage import squared_gradients, train_stage, whole_batches

Kernels = dict[str, dict[str, Tensor]]
"""Network -> layer -> a value for each kernel, (O,)."""


class AdamConfig(Config):
    quantile: float = Field(0.5, ge=0, lt=1, description="share of each network's kernels, the least important ones, that is "
                                                         "fine-tuned; the others are modulated. The paper has 0.5 to 0.75")
    probe: float = Field(0.2, gt=0, description="share of the trial's images on which importance is probed")
    fisher: float = Field(0.1, gt=0, description="share of the trial's images over which the Fisher information is averaged")
    rank: int = Field(1, ge=1, description="rank of each layer's modulation")
    rate: float = Field(100.0, gt=0, description="learning rate of the modulation over adaptation.lr")

    @model_validator(mode="after")
    def _leaves_a_budget(self) -> AdamConfig:
        if self.probe + self.fisher > 0.9:
            raise ValueError("probe and fisher leave the adaptation less than a tenth of the images; lower them")
        return self


class Modulated(nn.Module):
    """W_o -> W_o (1 + rate B_o A) for each kernel o that is important, whose W_o itself stays; other kernels as they are."""

    def __init__(self, weight: Tensor, important: Tensor, config: AdamConfig, transposed: bool,
                 generator: torch.Generator) -> None:
        super().__init__()
        self.rate, self.transposed = config.rate, transposed
        outputs, inputs = as_rows(weight, transposed).shape
        rank = min(config.rank, outputs, inputs)
        self.important = nn.Buffer(important)
        self.down = nn.Parameter(torch.randn(rank, inputs, generator=generator).to(weight))
        self.up = nn.Parameter(torch.zeros(outputs, rank).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        rows = as_rows(weight, self.transposed)
        modulated = rows.detach() * (1 + self.rate * self.up @ self.down)
        return as_weight(torch.where(self.important[:, None], modulated, rows), weight, self.transposed)


def modulate(networks: Networks, important: Kernels, config: AdamConfig, seed: int) -> None:
    """Give all layers the modulation of those of their kernels that are ``important`` (bool)."""
    for name, network in networks.items():
        for layer_name, layer in layers_of(network).items():
            generator = draw(seed, f"adam {name}.{layer_name}", 0)
            modulated = Modulated(weight_of(layer), important[name][layer_name], config, is_transposed(layer), generator)
            parametrize.register_parametrization(layer, "weight", modulated)


def importance(networks: Networks, adaptation: Adaptation) -> tuple[Kernels, int]:
    """Each kernel's Fisher information after the probing, and the images that it took; the networks stay as they are."""
    config = adaptation.recipe.adaptation.adam
    probed = {name: copy.deepcopy(network) for name, network in networks.items()}
    freeze(probed)
    modulate(probed, _each_kernel(networks, True), config, adaptation.seed)
    images = train_stage(probed, adaptation, whole_batches(adaptation, config.probe))
    adapted = {name: copy.deepcopy(network) for name, network in networks.items()}
    freeze(adapted)
    for name, network in adapted.items():
        network.load_state_dict(merged(probed[name]))
        for layer in layers_of(network).values():
            weight_of(layer).requires_grad_(True)
    total = images + whole_batches(adaptation, config.fisher)
    squares = squared_gradients(adapted, adaptation, images, total)
    found: Kernels = {}
    for name, network in networks.items():
        found[name] = {}
        for layer_name, layer in layers_of(network).items():
            entries = squares[name][f"{layer_name}.weight"] * weight_of(layer).detach().square()
            found[name][layer_name] = as_rows(entries, is_transposed(layer)).mean(1)
    return found, total


def above_quantile(kernels: Kernels, quantile: float) -> Kernels:
    """Which kernels are above that quantile of their network's."""
    return {name: {layer: values > torch.quantile(torch.cat(list(named.values())), quantile)
                   for layer, values in named.items()} for name, named in kernels.items()}


def probe_and_modulate(networks: Networks, adaptation: Adaptation) -> int:
    """Modulate the kernels that probing finds important.

    Raises:
        UserError: as `check_layers`.
    """
    check_layers(networks, "adam")
    config = adaptation.recipe.adaptation.adam
    if adaptation.resumed:  # which kernels they are is read with the weights
        important, images = _each_kernel(networks, False), 0
    else:
        fisher, images = importance(networks, adaptation)
        important = above_quantile(fisher, config.quantile)
    modulate(networks, important, config, adaptation.seed)
    return images


def _each_kernel(networks: Networks, value: bool) -> Kernels:
    kernels: Kernels = {}
    for name, network in networks.items():
        kernels[name] = {}
        for layer_name, layer in layers_of(network).items():
            rows = as_rows(weight_of(layer), is_transposed(layer))
            kernels[name][layer_name] = torch.full((len(rows),), value, device=rows.device)
    return kernels


METHOD = Method(start="pretrain", prepare=probe_and_modulate, hyperparameters=("lr", "r1", "adam.quantile", "adam.rate"))
