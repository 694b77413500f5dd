"""Weights as matrices of kernels, and merged parametrizations."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from data_shards import UserError
from tests.training.methods.start import recipe_of, start_of
from tests.training.models.make import latents
from training.methods.kernels import as_rows, as_weight, check_layers, is_transposed, layers_of, merged, weight_of
from training.models.style import ModulatedConv

LAYERS = [(nn.Conv2d(3, 5, 3), (3, 6, 6)), (nn.Conv2d(4, 6, 3, groups=2), (4, 6, 6)),
          (nn.ConvTranspose2d(3, 5, 4), (3, 6, 6)), (nn.Linear(3, 5), (3,)), (ModulatedConv(3, 5, 3, 7), (3, 6, 6))]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_a_row_is_what_one_output_channel_is_made_by(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """With the other rows at 0, only that channel is not 0."""
    weight, transposed = weight_of(layer), is_transposed(layer)
    rows = as_rows(weight, transposed).detach().clone()
    assert torch.equal(as_weight(rows, weight, transposed), weight)
    x = torch.randn(2, *shape)
    for channel in range(len(rows)):
        alone = torch.zeros_like(rows)
        alone[channel] = rows[channel]
        with torch.no_grad():
            weight.copy_(as_weight(alone, weight, transposed))
            if getattr(layer, "bias", None) is not None:
                layer.bias.zero_()  # type: ignore[operator]
            made = layer(x, torch.randn(2, 7)) if isinstance(layer, ModulatedConv) else layer(x)
        reached = made.abs().flatten(2).sum((0, 2)) if made.dim() == 4 else made.abs().sum(0)
        assert reached.nonzero().flatten().tolist() == [channel]


@pytest.mark.parametrize("model", ["dcgan", "resnet", "r3gan", "style", "mlp"])
def test_merging_keeps_the_function_and_the_names(tmp_path_factory: pytest.TempPathFactory, model: str) -> None:
    recipe = recipe_of(tmp_path_factory.mktemp("root"), model=model)
    network, z = start_of(recipe)["generator"], latents(4, dim=4)

    class Doubled(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    for layer in layers_of(network).values():
        parametrize.register_parametrization(layer, "weight", Doubled())
    plain = start_of(recipe, seed=1)["generator"]
    plain.load_state_dict(merged(network))
    assert torch.equal(plain(z), network(z))


def test_weights_that_have_a_parameterisation_are_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    recipe = recipe_of(tmp_path_factory.mktemp("root"), {"training.discriminator.spectral_norm": True})
    with pytest.raises(UserError, match=r"the method fsgan .* discriminator's weights .* switch it off"):
        check_layers(start_of(recipe), "fsgan")
