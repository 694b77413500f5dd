"""The style-based generator."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import conv2d, leaky_relu

from tests.training.models.make import latents, parameters, small_gan, stir
from training.models import make_gan
from training.models.config import DiscriminatorConfig, GeneratorConfig, StyleConfig
from training.models.style import Generator, ModulatedConv, SlowLinear


def style_generator(classes: int = 0, **settings: object) -> Generator:
    g, _ = small_gan("style", classes=classes, generator={"style": {"dim": 8, **settings}})
    assert isinstance(g, Generator)
    stir(g, scale=0.2)
    return g


@pytest.mark.parametrize("demodulate", [True, False])
def test_modulated_convolution_is_the_papers_sample_by_sample(demodulate: bool) -> None:
    """w' = s_i w_ijk, w'' = w' / sqrt(sum_ik w'^2 + eps) (Karras et al. 2020, equations 1 and 3), one image at a time."""
    torch.manual_seed(0)
    layer = ModulatedConv(5, 7, 3, style_dim=6, demodulate=demodulate)
    stir(layer)
    x, style = torch.randn(4, 5, 8, 9), torch.randn(4, 6)
    naive = []
    for image, w in zip(x, style, strict=True):
        scale = layer.affine.weight @ w + layer.affine.bias
        kernel = layer.weight * scale[None, :, None, None]
        if demodulate:
            kernel = kernel / (kernel.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        naive.append(conv2d(image[None], kernel, padding=1))
    torch.testing.assert_close(layer(x, style), torch.cat(naive), rtol=1e-5, atol=1e-5)


def test_demodulation_keeps_unit_variance() -> None:
    torch.manual_seed(0)
    layer = ModulatedConv(64, 64, 3, style_dim=6)
    stir(layer, scale=2)
    outputs = layer(torch.randn(8, 64, 16, 16), torch.randn(8, 6))[:, :, 1:-1, 1:-1]
    assert float(outputs.detach().std()) == pytest.approx(1, abs=0.05)


def test_adam_moves_the_mapping_network_at_its_own_rate() -> None:
    """The function moves by rate x lr a weight: stored weights are 1 / rate larger and Adam's step does not know."""
    torch.manual_seed(0)
    layer = SlowLinear(16, 16, rate=0.01)
    before = layer.weight.detach() * 0.01
    assert float(before.std()) == pytest.approx(math.sqrt(2 / 1.04 / 16), rel=0.15)
    x = torch.randn(4, 16)
    torch.testing.assert_close(layer(x), leaky_relu(x @ before.T, 0.2), rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3, betas=(0.0, 0.99))
    layer(x).square().sum().backward()
    optimizer.step()
    moved = (layer.weight.detach() * 0.01 - before).abs()
    torch.testing.assert_close(moved, torch.full_like(before, 1e-5), rtol=0.05, atol=1e-8)


def test_truncation_moves_styles_towards_their_mean() -> None:
    """psi = 0 is one picture but for its noise, psi = 1 the plain one, and the mean is that of the mapped latents."""
    g = style_generator(noise=False).eval().requires_grad_(False)
    z = latents(8)
    torch.testing.assert_close(g(z, truncation=1.0), g(z))
    collapsed = g(z, truncation=0.0)
    torch.testing.assert_close(collapsed, collapsed[:1].expand_as(collapsed))
    mean = g.styles(latents(20_000, seed=4)).mean(0, keepdim=True)
    spread = g.styles(latents(1000, seed=4)).std(0).mean()
    assert float((g.mean_style() - mean).abs().max()) < 0.2 * float(spread)
    half = g.mean_style() + 0.5 * (g.styles(z) - g.mean_style())
    torch.testing.assert_close(g(z, truncation=0.5), g.synthesis(half[:, None].expand(-1, len(g.blocks), -1)))
    spreads = [float(g(z, truncation=psi).std(0).mean()) for psi in (0.0, 0.5, 1.0)]
    assert spreads == sorted(spreads)


def test_each_class_has_a_mean_style() -> None:
    g = style_generator(classes=3).eval()
    labels = torch.tensor([2, 0, 2])
    means = g.mean_style(labels)
    assert means.shape == (3, 8)
    assert torch.equal(means[0], means[2])
    assert not torch.allclose(means[0], means[1])
    assert g.mean_style().shape == (1, 8)


def test_noise_is_a_function_of_the_latent() -> None:
    g = style_generator().eval()
    z = latents(6)
    assert torch.equal(g(z), g(z))
    styles = g.styles(z)[:, None].expand(-1, len(g.blocks), -1)
    quiet, noisy = g.synthesis(styles), g.synthesis(styles, z)
    assert (quiet - noisy).abs().amax((1, 2, 3)).min() > 1e-3
    other = g.synthesis(styles, latents(6, seed=11)) - quiet
    correlation = torch.corrcoef(torch.stack([(noisy - quiet).flatten(), other.flatten()]))[0, 1]
    assert abs(correlation.item()) < 0.2


def test_half_a_batch_is_half_of_the_batch_with_noise_and_mixing() -> None:
    g = style_generator(mixing=0.5)
    assert g.training
    z = latents(16)
    torch.testing.assert_close(torch.cat([g(z[0::2]), g(z[1::2])]), torch.cat([g(z)[0::2], g(z)[1::2]]), rtol=1e-4, atol=1e-5)


def test_style_mixing_takes_the_finer_blocks_from_a_second_latent() -> None:
    g = style_generator(mixing=0.5)
    z = latents(400)
    plain = g.styles(z)[:, None].expand(-1, len(g.blocks), -1)
    mixed = g._mixed(plain, z, None)
    torch.testing.assert_close(g(z[:2]), g.synthesis(mixed[:2], z[:2]))
    torch.testing.assert_close(g.eval()(z[:2]), g.synthesis(plain[:2], z[:2]))
    same = (mixed == plain).all(2)
    assert same[:, 0].all()  # the coarsest block is never taken from the second
    changed = ~same.all(1)
    assert float(changed.float().mean()) == pytest.approx(0.5, abs=0.1)
    first = same.float().sum(1)[changed]  # blocks before the crossover: 1 ... L - 1, alike
    counts = torch.bincount(first.long(), minlength=len(g.blocks))[1:len(g.blocks)]
    assert int(counts.min()) > 0.6 * int(changed.sum()) / (len(g.blocks) - 1)
    for row, count in zip(same[changed], first.long(), strict=True):
        assert row.tolist() == [True] * int(count) + [False] * (len(g.blocks) - int(count))


def test_parameters() -> None:
    """Counted by hand for 2 resolutions of 8 channels, style of 5, z of 4, one image channel."""
    networks = make_gan(GeneratorConfig(model="style", channels=8, growth=1, latent_dim=4, style=StyleConfig(dim=5)),
                        DiscriminatorConfig(channels=8, growth=1), (1, 8, 8))
    layer = 8 * 8 * 9 + (5 * 8 + 8) + 8 + 1  # kernel, affine, bias, noise
    image = 8 + (5 * 8 + 8) + 1
    assert parameters(networks["generator"]) == (4 * 5 + 5) + (5 * 5 + 5) + 8 * 16 + 3 * layer + 2 * image
    down = (8 + 8) + 2 * (8 * 8 * 9 + 8) + 64
    tail = (8 * 8 * 9 + 8) + (8 * 16 * 8 + 8) + 8
    assert parameters(networks["discriminator"]) == down + tail
