"""What every network of a GAN must do, whatever its shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

import training.pretrain as pretrain_module
from data_shards import UserError
from tests.ranks import run_ranks
from tests.toy import toy_recipe, toy_set
from tests.training.models.make import latents, pictures, small_gan, stir
from training.models import MODELS
from training.networks import make_networks
from training.objectives.penalties import finite_difference_norms, squared_gradient_norms
from training.pretrain import pretrain
from training.recipe import TrainingConfig
from training.source import open_cached
from training.world import World

CLASSES = 3
LABELS = torch.tensor([0, 2, 1, 1, 0, 0, 2, 1])


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [28, 32, 64, 256])
@pytest.mark.parametrize("model", MODELS)
def test_images_of_any_size_and_channels(model: str, size: int, channels: int) -> None:
    shape = (channels, size, size)
    g, d = small_gan(model, shape)
    with torch.no_grad():
        images = g(latents(2))
        logits = d(pictures(2, shape))
    assert images.shape == (2, *shape)
    assert logits.shape == (2,)
    assert 0.02 < float(images.std()) < 2.5  # of the order of [-1, 1] at the start, neither faint nor saturated
    assert torch.isfinite(logits).all()
    assert not torch.equal(images[0], images[1])
    assert float(logits.abs().max()) < 20


@pytest.mark.parametrize("shape", [(1, 30, 30), (3, 36, 36), (1, 16, 40), (3, 100, 100)])
@pytest.mark.parametrize("model", ["mlp", "resnet", "r3gan", "style"])
def test_sizes_that_are_no_power_of_two_times_a_small_number(model: str, shape: tuple[int, int, int]) -> None:
    g, d = small_gan(model, shape)
    with torch.no_grad():
        assert g(latents(2)).shape == (2, *shape)
        assert d(pictures(2, shape)).shape == (2,)


@pytest.mark.parametrize("model", ["dcgan", "resnet", "r3gan", "style"])
@pytest.mark.parametrize("shape", [(2,), (1, 4, 4)])
def test_what_no_convolution_fits_is_refused(model: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"pack the set at another --size|use the model mlp"):
        small_gan(model, shape)


@pytest.mark.parametrize("model", MODELS)
def test_there_are_no_batch_statistics(model: str) -> None:
    """A sample's result is the same alone and in company."""
    g, d = small_gan(model)
    for network, inputs in ((g, latents(8)), (d, pictures(8))):
        stir(network, scale=0.05)
        whole = network(inputs)
        alone = torch.cat([network(one) for one in inputs.split(1)])
        torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_minibatch_deviation_does_not_depend_on_how_a_batch_was_split(model: str, ranks: int) -> None:
    _, d = small_gan(model, minibatch_std=4)
    images = pictures(16) * torch.linspace(0.1, 1, 16)[:, None, None, None]
    whole = d(images)
    for rank in range(ranks):
        world = World(rank, ranks)
        torch.testing.assert_close(d(world.slice(images)), world.slice(whole), rtol=1e-4, atol=1e-5)
    assert (d(images[:4]) - whole[:4]).abs().max() > 1e-5  # other company, other deviation: the layer is there
    with pytest.raises(UserError, match="minibatch_std = 4"):
        d(images[:6])


@pytest.mark.parametrize("model", MODELS)
def test_the_penalty_has_the_gradient_of_the_finite_difference(model: str) -> None:
    """Double backward, in double precision along a random direction of all of D's weights."""
    _, d = small_gan(model, classes=CLASSES)
    stir(d, scale=0.1)
    d = d.double()
    images = pictures(8).double().requires_grad_(True)

    def penalty() -> Tensor:
        (gradient,) = torch.autograd.grad(d(images, LABELS).sum(), images, create_graph=True)
        return gradient.square().sum() / len(images)

    draw = torch.Generator().manual_seed(5)
    direction = [torch.randn(p.shape, generator=draw).double() for p in d.parameters()]
    gradients = torch.autograd.grad(penalty(), list(d.parameters()), allow_unused=True)
    analytic = sum(float((g * v).sum()) for g, v in zip(gradients, direction, strict=True) if g is not None)
    step, values = 1e-6, []
    for move in (step, -2 * step):
        with torch.no_grad():
            for parameter, v in zip(d.parameters(), direction, strict=True):
                parameter.add_(move * v)
        values.append(penalty().item())
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(analytic, rel=1e-4)
    assert abs(analytic) > 1e-6


@pytest.mark.parametrize("model", MODELS)
def test_finite_difference_penalties_know_every_kink(model: str) -> None:
    """Under ZeRO 3: the gradient of R1 without double backward, of maxout units too."""
    _, d = small_gan(model, mlp={"pieces": 3})
    stir(d, scale=0.1)
    images = pictures(8)
    _, approximate = finite_difference_norms(d, images)
    images.requires_grad_(True)
    exact = squared_gradient_norms(d(images), images)
    torch.testing.assert_close(approximate, exact, rtol=1e-4, atol=1e-6)
    ours, reference = (torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(
        torch.autograd.grad(norms.sum(), list(d.parameters()), allow_unused=True), d.parameters(), strict=True)])
        for norms in (approximate, exact))
    assert float((ours - reference).norm()) < 0.02 * float(reference.norm())


@pytest.mark.parametrize("classes", [0, CLASSES])
@pytest.mark.parametrize("model", MODELS)
def test_weights_go_through_safetensors_and_back(model: str, classes: int, tmp_path: Path) -> None:
    for i, (network, inputs) in enumerate(zip(small_gan(model, classes=classes), (latents(8), pictures(8)), strict=True)):
        save_file(network.state_dict(), tmp_path / "weights.safetensors")
        other = small_gan(model, seed=7, classes=classes)[i]
        assert not torch.equal(network(inputs, LABELS), other(inputs, LABELS))
        other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
        assert torch.equal(network(inputs, LABELS), other(inputs, LABELS))


@pytest.mark.parametrize("model", MODELS)
def test_a_seed_decides_the_weights(model: str) -> None:
    config = TrainingConfig.model_validate({"generator": {"model": model, "channels": 4}, "discriminator": {"channels": 4},
                                            "images": 1})
    first, again, other = (make_networks(config, (1, 16, 16), seed) for seed in (0, 0, 1))
    for name, network in first.items():
        weights = network.state_dict()
        assert all(torch.equal(value, again[name].state_dict()[key]) for key, value in weights.items())
        assert any(not torch.equal(value, other[name].state_dict()[key]) for key, value in weights.items())


@pytest.mark.parametrize("model", MODELS)
def test_a_step_can_be_differentiated_through(model: str) -> None:
    """MAML's outer gradient of both networks: through one inner step taken by functional calls."""
    for network, inputs in zip(small_gan(model), (latents(4), pictures(4)), strict=True):
        stir(network, scale=0.05)
        weights: dict[str, Tensor] = dict(network.named_parameters())
        outputs = functional_call(network, weights, (inputs,))
        assert torch.equal(outputs, network(inputs))
        gradients = torch.autograd.grad(outputs.square().mean(), list(weights.values()), create_graph=True)
        moved = {key: p - 0.1 * gradient for (key, p), gradient in zip(weights.items(), gradients, strict=True)}
        outer = torch.autograd.grad(functional_call(network, moved, (inputs,)).square().mean(), list(weights.values()))
        leaves = {key: p.detach().requires_grad_() for key, p in moved.items()}
        first_order = torch.autograd.grad(functional_call(network, leaves, (inputs,)).square().mean(), list(leaves.values()))
        assert all(torch.isfinite(gradient).all() for gradient in outer)
        distance = sum((a - b).square().sum() for a, b in zip(outer, first_order, strict=True))
        assert distance > 1e-6 * sum(b.square().sum() for b in first_order)  # the inner step's own derivative is in it


@pytest.mark.parametrize("model", MODELS)
def test_parts_hold_each_parameter_of_the_generator_once(model: str) -> None:
    g, _ = small_gan(model, classes=CLASSES)
    parts = g.parts()  # type: ignore[operator]  # Module.__getattr__ is untyped
    found = [id(p) for part in parts for module in part for p in module.parameters()]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in g.parameters()}
    assert all(any(True for module in part for _ in module.parameters()) for part in (parts.early, parts.late))


@pytest.mark.parametrize("model", MODELS)
def test_blocks_of_the_discriminator_stand_from_the_image_on(model: str) -> None:
    """With the first k blocks frozen no gradient reaches the image's side: what block k - 1 gives out needs none."""
    _, d = small_gan(model, (1, 32, 32))
    blocks = d.blocks
    assert isinstance(blocks, nn.ModuleList)
    assert len(blocks) >= 3
    needed: list[bool] = []
    for block in blocks:
        block.register_forward_hook(lambda _module, _inputs, output: needed.append(output.requires_grad))
    for frozen, block in enumerate(blocks, 1):
        block.requires_grad_(False)
        needed.clear()
        d(pictures(2, (1, 32, 32)))
        assert needed == [False] * frozen + [True] * (len(blocks) - frozen)


@pytest.mark.parametrize("model", MODELS)
def test_a_conditional_network_starts_as_its_unconditional_twin_and_then_tells_classes_apart(model: str) -> None:
    for network, inputs in zip(small_gan(model, classes=CLASSES), (latents(8), pictures(8)), strict=True):
        tables = [p for name, p in network.named_parameters() if "class_embedding" in name]
        assert tables
        assert all(len(table) == CLASSES for table in tables)
        assert not any(bool(table.any()) for table in tables)
        assert torch.equal(network(inputs, LABELS), network(inputs, LABELS.roll(1)))
        stir(network, scale=0.1)
        told, otherwise = network(inputs, LABELS), network(inputs, LABELS.roll(1))
        same = LABELS.eq(LABELS.roll(1))
        assert torch.equal(told[same], otherwise[same])
        changes = (told - otherwise)[~same].abs().reshape(int((~same).sum()), -1).amax(1)
        assert bool(changes.gt(0).all())
        with pytest.raises(UserError, match="told one of 3 classes"):
            network(inputs)


@pytest.mark.parametrize("model", MODELS)
def test_an_unconditional_network_ignores_labels(model: str) -> None:
    for network, inputs in zip(small_gan(model), (latents(8), pictures(8)), strict=True):
        assert torch.equal(network(inputs, LABELS), network(inputs))


@pytest.mark.parametrize("model", MODELS)
def test_the_projection_is_the_papers_formula(model: str) -> None:
    """psi(f) + v_y . f, sample by sample (Miyato and Koyama 2018, equation 4)."""
    _, d = small_gan(model, classes=CLASSES)
    stir(d, scale=0.1)
    images = pictures(8)
    logits = d(images, LABELS)
    weights = d.state_dict()
    for i, label in enumerate(LABELS.tolist()):
        features = d.features(images[i:i + 1])[0]  # type: ignore[operator]  # Module.__getattr__ is untyped
        by_hand = features @ weights["head.weight"][0] + features @ weights["head.class_embedding.weight"][label]
        assert logits[i].item() == pytest.approx(by_hand.item(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_packing_widens_the_discriminator_only(model: str) -> None:
    g, d = small_gan(model, packed=2)
    assert g(latents(2)).shape == (2, 1, 16, 16)
    assert d(pictures(2, (2, 16, 16))).shape == (2,)
    with pytest.raises(UserError, match="exclude each other"):
        small_gan(model, packed=2, classes=2)


@pytest.mark.parametrize("model", sorted(set(MODELS) - {"r3gan"}))
def test_spectral_normalisation_bounds_every_layer(model: str) -> None:
    _, d = small_gan(model, classes=CLASSES, spectral_norm=True)
    images = pictures(8)
    before = {name: value.clone() for name, value in d.state_dict().items()}
    for _ in range(60):  # a step of power iteration each
        logits = d(images, LABELS)
    assert torch.isfinite(logits).all()
    layers = [module for module in d.modules() if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding)]
    for layer in layers:
        assert float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) == pytest.approx(1, abs=0.02)
    moved = {name for name, value in d.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.endswith(("_u", "_v")) for name in moved)  # what a resumed run needs is in the state dict


def test_spectral_normalisation_of_layers_that_start_at_zero_is_refused() -> None:
    with pytest.raises(UserError, match="start at 0"):
        small_gan("r3gan", spectral_norm=True)


@pytest.mark.parametrize("model", MODELS)
def test_bf16_autocast_is_near_fp32(model: str) -> None:
    networks = small_gan(model, minibatch_std=4, spectral_norm=model != "r3gan")
    for network, inputs in zip(networks, (latents(8), pictures(8)), strict=True):
        exact = network(inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = network(inputs)
        assert rough.dtype in (torch.bfloat16, torch.float32)
        assert float((rough.float() - exact).detach().abs().max()) < 0.1 * float(exact.detach().abs().max()) + 0.02


def a_few_steps(world: World, root: str, kind: str, zero: int) -> dict[str, list[str]]:
    """Pretrain every model for three steps of 8 images; the tensors of the checkpoint by model."""
    found = {}
    for model in MODELS:
        recipe = toy_recipe(Path(root), images=24, generator={"model": model, "channels": 4, "latent_dim": 4},
                            discriminator={"channels": 4}, engine={"kind": kind, "zero": zero, "persistence_threshold": 0})
        folder = pretrain(recipe, open_cached(f"{root}/source"), Path(root) / model, world)
        weights = load_file(folder / "generator.safetensors")
        assert all(bool(torch.isfinite(value).all()) for value in weights.values())
        fresh = make_networks(recipe.training, (1, 16, 16), recipe.seed)["generator"].state_dict()
        found[model] = [name for name, value in weights.items() if not torch.equal(value, fresh[name])]
    return found


@pytest.mark.parametrize(("kind", "zero"), [("torch", 0), ("deepspeed", 2), ("deepspeed", 3)])
def test_every_model_trains_under_either_engine(kind: str, zero: int, tmp_path: Path) -> None:
    toy_set(tmp_path / "source")
    (moved,) = run_ranks(a_few_steps, 1, str(tmp_path), kind, zero)
    assert moved.keys() == MODELS.keys()
    assert all(names for names in moved.values())


def on_two_ranks(world: World, root: str) -> dict[str, Tensor]:
    """D's whole state, power iteration included, after three steps under ZeRO 2."""
    recipe = toy_recipe(Path(root), images=24, generator={"channels": 4, "latent_dim": 4},
                        discriminator={"channels": 4, "minibatch_std": 4, "spectral_norm": True},
                        engine={"kind": "deepspeed", "zero": 2})
    kept: list[nn.Module] = []

    def keep(*arguments: Any) -> dict[str, nn.Module]:
        networks = make_networks(*arguments)
        kept.append(networks["discriminator"])
        return networks

    pretrain_module.make_networks = keep  # type: ignore[assignment,attr-defined]  # in this process of the test only
    pretrain(recipe, open_cached(f"{root}/source"), Path(root) / "run", world)
    return {name: value.clone() for name, value in kept[0].state_dict().items()}


def test_power_iteration_stays_equal_over_ranks_and_is_saved(tmp_path: Path) -> None:
    toy_set(tmp_path / "source")
    first, second = run_ranks(on_two_ranks, 2, str(tmp_path))
    (folder,) = sorted((tmp_path / "run/pretrain").glob("step-*"))[-1:]
    saved = load_file(folder / "discriminator.safetensors")
    assert any(name.endswith("_u") for name in saved)
    for name, value in saved.items():
        assert torch.equal(first[name], second[name])
        assert torch.equal(first[name], value)
