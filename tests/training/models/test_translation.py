"""CycleGAN's networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_shards import UserError
from tests.training.models.make import parameters, pictures, stir
from training.models.translation import Convolution, PatchDiscriminator, Translator


def test_parameters_are_those_of_the_authors_code() -> None:
    """11,378,179 and 2,764,737 with 64 channels and 9 blocks, as its printout gives them (its issue 169; 2.765 M)."""
    with torch.device("meta"):
        assert parameters(Translator(3, 3)) == 11_378_179
        assert parameters(PatchDiscriminator(3)) == 2_764_737


@pytest.mark.parametrize("size", [28, 32, 64])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 3), (3, 1)])
def test_shapes(size: int, inputs: int, outputs: int) -> None:
    translated = Translator(inputs, outputs, channels=4, blocks=1)(pictures(2, (inputs, size, size)))
    assert translated.shape == (2, outputs, size, size)
    assert float(translated.detach().abs().max()) <= 1
    patches = PatchDiscriminator(inputs, channels=4)(pictures(2, (inputs, size, size)))
    assert patches.shape == (2, (size // 8 - 2) ** 2)


def test_a_patch_logit_sees_70_pixels() -> None:
    """The receptive field of three halvings (Isola et al. 2017)."""
    d = PatchDiscriminator(1, channels=4)
    d.norms = torch.nn.ModuleList(torch.nn.Identity() for _ in d.norms)  # instance normalisation sees the whole image
    images = pictures(1, (1, 128, 128)).requires_grad_(True)
    logits = d(images).view(14, 14)
    (gradient,) = torch.autograd.grad(logits[7, 7], images)
    rows = gradient[0, 0].abs().sum(1).nonzero().flatten()
    assert int(rows.max() - rows.min()) + 1 == 70


def test_normalisation_and_padding_by_hand() -> None:
    layer = Convolution(2, 3, 3)
    stir(layer)
    x = pictures(2, (2, 6, 6))
    y = torch.nn.functional.conv2d(torch.nn.functional.pad(x, (1, 1, 1, 1), mode="reflect"), layer.conv.weight, layer.conv.bias)
    y = (y - y.mean((2, 3), keepdim=True)) / (y.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(layer(x), y.relu())


def test_batches_may_be_split_and_weights_saved(tmp_path: Path) -> None:
    pairs = ((Translator(1, 1, 4, 1), Translator(1, 1, 4, 1)), (PatchDiscriminator(1, 4), PatchDiscriminator(1, 4)))
    for network, again in pairs:
        stir(network, scale=0.1)
        x = pictures(4, (1, 28, 28))
        torch.testing.assert_close(torch.cat([network(part) for part in x.split(1)]), network(x), rtol=1e-4, atol=1e-5)
        save_file(network.state_dict(), tmp_path / "w.safetensors")
        again.load_state_dict(load_file(tmp_path / "w.safetensors"))
        assert torch.equal(again(x), network(x))


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="halves images twice"):
        Translator(1, 1, 4, 1)(pictures(1, (1, 30, 30)))
    with pytest.raises(UserError, match="at least 24"):
        PatchDiscriminator(1, 4)(pictures(1, (1, 16, 16)))
    assert PatchDiscriminator(1, 4, halvings=2)(pictures(1, (1, 16, 16))).shape == (1, 4)
