"""BSA: what trains is scale and shift per channel, and it is the scale and shift."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.training.methods.start import adaptation_of, recipe_of, start_of
from training.methods.bsa import Scaled, scale_and_shift
from training.methods.kernels import as_rows, is_transposed, layers_of, weight_of


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 5, 3), nn.ConvTranspose2d(3, 5, 4), nn.Linear(6, 5)])
def test_a_gain_scales_the_output_channel(layer: nn.Module) -> None:
    scaled = Scaled(5, 10.0, is_transposed(layer))
    weight = weight_of(layer)
    assert torch.equal(scaled(weight), weight)
    with torch.no_grad():
        scaled.gain.copy_(torch.linspace(-0.1, 0.1, 5))
        x = torch.randn(2, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 7, 7)
        layer.bias.zero_()  # type: ignore[operator]
        before = layer(x)
        weight.copy_(scaled(weight))
        factor = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0]).view(1, 5, *[1] * (before.dim() - 2))
        torch.testing.assert_close(layer(x), before * factor)


@pytest.mark.parametrize(("model", "classes"), [
    ("dcgan", 0), ("dcgan", 2), ("resnet", 2), ("r3gan", 0), ("style", 0), ("mlp", 0)])
def test_one_scale_and_at_most_one_shift_train_for_each_channel(tmp_path: Path, model: str, classes: int) -> None:
    recipe = recipe_of(tmp_path, {"training.generator.classes": classes}, model)
    networks = start_of(recipe)
    scale_and_shift(networks, adaptation_of(recipe, networks))
    trained = {name: p for name, p in networks["generator"].named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        kind = name.rpartition(".")[2]
        assert kind in ("gain", "bias", "image_bias") or "norm" in name or "film" in name, name
        if kind == "gain":
            layer = networks["generator"].get_submodule(name.partition(".parametrizations")[0])
            assert parameter.shape == as_rows(weight_of(layer), is_transposed(layer)).shape[:1]
    scales = sum(name.endswith("gain") for name in trained)
    demodulated = sum(bool(getattr(layer, "demodulate", False)) for layer in layers_of(networks["generator"]).values())
    assert scales == len(layers_of(networks["generator"])) - demodulated
    assert (demodulated > 0) is (model == "style")
    if classes:
        assert any("film" in name for name in trained)
    assert all(p.requires_grad for p in networks["discriminator"].parameters())
