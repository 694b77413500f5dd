"""EWC: its Fisher information against samples one by one and a closed form, its penalty against its formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import softplus

from data_shards import UserError
from tests.training.methods.start import adaptation_of, batch_of, recipe_of, start_of
from tests.training.models.make import LATENT, latents, small_gan, stir
from training import draws
from training.methods import METHODS
from training.methods.ewc import fisher_information
from training.objectives.packing import pack


def test_the_fisher_information_is_the_mean_of_squared_gradients_of_single_samples() -> None:
    """All samples' gradients at once by torch.func, which the method does not use."""
    generator, discriminator = small_gan("dcgan")
    stir(generator)
    stir(discriminator)
    z = latents(12)

    def loss(weights: dict[str, Tensor], latent: Tensor) -> Tensor:
        logit = discriminator(functional_call(generator, weights, (latent[None],)))
        return softplus(-logit).sum()

    weights = {name: p.detach() for name, p in generator.named_parameters()}
    squares = {name: g.square().mean(0) for name, g in vmap(grad(loss), in_dims=(None, 0))(weights, z).items()}
    mean = sum(s.sum() for s in squares.values()) / sum(s.numel() for s in squares.values())
    found = fisher_information(generator, discriminator, z)
    assert found.keys() == squares.keys()
    for name, square in squares.items():
        torch.testing.assert_close(found[name], square / mean, rtol=2e-4, atol=1e-5)
    # Not the square of the mean gradient, which a batch's single backward would give.
    weight = generator.get_parameter("project.weight")
    (batch_gradient,) = torch.autograd.grad(softplus(-discriminator(generator(z))).mean(), weight)
    assert (found["project.weight"] * mean - batch_gradient.square()).abs().max() > 0.1 * squares["project.weight"].max()


def test_linear_networks_have_the_fisher_information_of_the_formula() -> None:
    """G(z) = A z, D(x) = d x: dL/dA = -(1 - sigmoid(d A z)) d z^T."""
    generator, discriminator = nn.Linear(3, 2, bias=False).double(), Scalar().double()
    z = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direction = discriminator.line.weight[0]
    with torch.no_grad():
        slope = torch.sigmoid(-(z @ generator.weight.T @ direction))
        expected = (slope[:, None, None] * direction[None, :, None] * z[:, None, :]).square().mean(0)
    found = fisher_information(Told(generator), discriminator, z)["inner.weight"]
    torch.testing.assert_close(found, expected / expected.mean())
    assert found.mean().item() == pytest.approx(1)


class Told(nn.Module):
    """Takes labels as the models here do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.inner(x)


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 1, bias=False)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.line(x).squeeze(1)


def test_packs_and_groups_stand_for_samples() -> None:
    generator, discriminator = small_gan("dcgan", packed=2, minibatch_std=2)
    stir(generator)
    stir(discriminator)
    z = latents(8)
    total: dict[str, Tensor] = {name: torch.zeros_like(p) for name, p in generator.named_parameters()}
    for lot in (z[:4], z[4:]):
        generator.zero_grad()
        softplus(-discriminator(pack(generator(lot), 2))).mean().backward()
        for name, parameter in generator.named_parameters():
            assert parameter.grad is not None
            total[name] += parameter.grad.square()
    mean = sum(t.sum() for t in total.values()) / sum(t.numel() for t in total.values())
    for name, found in fisher_information(generator, discriminator, z, packed=2, group=2).items():
        torch.testing.assert_close(found, total[name] / mean, rtol=1e-4, atol=1e-6)


def test_networks_are_left_as_they_are() -> None:
    generator, discriminator = small_gan("resnet", spectral_norm=True)
    tensors = [*generator.state_dict().values(), *discriminator.state_dict().values()]
    before = [tensor.clone() for tensor in tensors]
    fisher_information(generator, discriminator, latents(4))
    assert all(map(torch.equal, tensors, before))
    assert all(p.requires_grad and p.grad is None for p in [*generator.parameters(), *discriminator.parameters()])
    assert generator.training and discriminator.training


def test_it_is_that_of_the_networks_in_evaluation_mode() -> None:
    """No style mixing, and no power iteration of spectral norms between the samples."""
    for model, normed in (("style", False), ("dcgan", True)):
        generator, discriminator = small_gan(model, spectral_norm=normed)
        stir(generator)
        training = fisher_information(generator, discriminator, latents(6))
        still = fisher_information(generator.eval(), discriminator.eval(), latents(6))
        assert all(torch.equal(value, still[name]) for name, value in training.items())


def test_the_penalty_and_its_gradient_are_those_of_the_formula_and_nothing_at_the_start(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"adaptation.ewc": {"weight": 0.4, "samples": 8}})
    networks = start_of(recipe)
    adaptation, batch = adaptation_of(recipe, networks), batch_of(recipe)
    (d_before, g_before), (d_after, g_after) = adaptation.phases, METHODS["ewc"].phases(adaptation)
    assert d_before is d_after
    z = draws.latents(1, "fisher", 0, 8, 4)
    importance = fisher_information(adaptation.source["generator"], adaptation.source["discriminator"], z)
    parameters = dict(networks["generator"].named_parameters())
    for shift in (0.0, 0.05):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(dict(adaptation.source["generator"].named_parameters())[name] + shift)
        terms, bare = g_after.loss(networks, batch), g_before.loss(networks, batch)
        count = sum(p.numel() for p in parameters.values())
        assert terms["ewc"].item() == pytest.approx(count * shift**2, rel=1e-3)  # F has the mean 1
        gradients = torch.autograd.grad(terms["total"] - bare["total"], list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            torch.testing.assert_close(gradient, 2 * 0.4 * importance[name] * shift, rtol=1e-3, atol=1e-5)


def test_a_discriminator_that_says_nothing_is_refused() -> None:
    generator, discriminator = small_gan("dcgan")
    with torch.no_grad():
        discriminator.head.weight.zero_()  # type: ignore[operator,union-attr]  # Module.__getattr__ is untyped
    with pytest.raises(UserError, match="no importance"):
        fisher_information(generator, discriminator, torch.randn(2, LATENT))
