"""Encoders and decoders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_shards import UserError
from tests.training.models.make import latents, parameters, pictures, stir
from training.models.autoencoder import AUTOENCODERS, Autoencoder
from training.models.config import GeneratorConfig, MlpConfig


def small(model: str, shape: tuple[int, ...] = (1, 28, 28), classes: int = 0) -> Autoencoder:
    torch.manual_seed(0)
    return AUTOENCODERS[model](GeneratorConfig(channels=8, latent_dim=6, classes=classes), shape)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (4, 64, 64)])
@pytest.mark.parametrize("model", AUTOENCODERS)
def test_shapes(model: str, shape: tuple[int, ...]) -> None:
    network = small(model, shape)
    mean, log_variance = network.encode(pictures(3, shape))
    assert mean.shape == log_variance.shape == (3, 6)
    assert network(mean).shape == (3, *shape)
    assert float(mean.detach().abs().max()) < 1.5  # q starts near N(0, I)
    assert float(log_variance.detach().abs().max()) < 1.5


def test_the_classic_mnist_network() -> None:
    """784-500-20-500-784 (Kingma and Welling 2014, section 5: 500 hidden units on MNIST)."""
    network = AUTOENCODERS["mlp"](GeneratorConfig(channels=500, latent_dim=20, mlp=MlpConfig(layers=1)), (1, 28, 28))
    assert parameters(network) == 785 * 500 + 501 * 40 + 21 * 500 + 501 * 784


@pytest.mark.parametrize("model", AUTOENCODERS)
def test_a_reconstruction_can_be_learned(model: str) -> None:
    """Gradients reach both halves: 8 images are remembered."""
    network, images = small(model), pictures(8, (1, 28, 28)).round()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        loss = (network(network.encode(images)[0]) - images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert all(p.grad is not None and bool(p.grad.any()) for p in network.parameters())


@pytest.mark.parametrize("model", AUTOENCODERS)
def test_classes_weights_and_parts(model: str, tmp_path: Path) -> None:
    network, labels = small(model, classes=2), torch.tensor([0, 1])
    stir(network, scale=0.1)
    images = pictures(1, (1, 28, 28)).expand(2, -1, -1, -1)
    mean, _ = network.encode(images, labels)
    made = network(latents(1).expand(2, -1), labels)
    assert not torch.allclose(mean[0], mean[1])
    assert not torch.allclose(made[0], made[1])
    with pytest.raises(UserError, match="told one of 2 classes"):
        network(latents(1))
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    other = small(model, classes=2)
    other.load_state_dict(load_file(tmp_path / "w.safetensors"))
    assert torch.equal(other(latents(1).expand(2, -1), labels), made)
    parts = network.parts()
    assert {id(p) for part in parts for m in part for p in m.parameters()} == {id(p) for p in network.decoder.parameters()}
