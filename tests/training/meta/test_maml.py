"""MAML: meta-gradients against closed forms and finite differences; what it cannot do is refused."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_shards import Batch as Images
from data_shards import UserError
from tests.training.meta.points import ONE_NETWORK, Point, centre_of, images, inner_loop
from tests.training.models.make import LATENT, latents, pictures, small_gan, stir
from training.augment import NO_AUGMENTATION
from training.families import FAMILIES, Batch, Networks, Phase, Terms, gan_phases
from training.loop import Plan, drawn
from training.meta import maml
from training.meta.maml import meta_gradients
from training.models.config import DiscriminatorConfig, GeneratorConfig
from training.networks import make_networks
from training.recipe import TrainingConfig

PHASES = ONE_NETWORK.phases(TrainingConfig(images=1), NO_AUGMENTATION)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_meta_gradient_of_a_quadratic_is_the_one_worked_out_by_hand(steps: int) -> None:
    """With curvature a, phi~ = c + (1 - lr a)^K (phi - c), so that dL_q/dphi = a (phi~ - c_q) (1 - lr a)^K."""
    lr, body, head = 0.1, 0.5, -1.0
    support, query = centre_of(204), centre_of(51)
    found, metrics = maml.gradients(inner_loop({"generator": Point(body, head)}, PHASES, images(204), images(51),
                                               steps=steps, lr=lr))
    for key, curvature, start, towards, queried in (("body", 1.0, body, support, query), ("head", 2.0, head, -support, -query)):
        shrunk = (1 - lr * curvature) ** steps
        expected = curvature * (towards + shrunk * (start - towards) - queried) * shrunk
        assert found["generator"][key].item() == pytest.approx(expected, rel=1e-5)
    assert metrics.keys() == {"generator/total", "generator/adversarial", "generator/query"}


def test_what_the_inner_loop_leaves_out_has_the_gradient_of_the_query_loss_alone() -> None:
    """ANIL: only the head is adapted; the body's meta-gradient is then that of the query loss, without a factor."""
    found, _ = maml.gradients(inner_loop({"generator": Point(0.5, -1.0)}, PHASES, images(204), images(51), steps=3, lr=0.1,
                                         parts=["generator.head"]))
    shrunk = (1 - 0.1 * 2) ** 3
    adapted = -centre_of(204) + shrunk * (-1.0 + centre_of(204))
    assert found["generator"]["body"].item() == pytest.approx(0.5 - centre_of(51), rel=1e-5)
    assert found["generator"]["head"].item() == pytest.approx(2 * (adapted + centre_of(51)) * shrunk, rel=1e-5)


class Scalar(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))


def players(networks: Networks, batch: Batch) -> tuple[Tensor, Tensor]:
    return networks["discriminator"].value, networks["generator"].value  # type: ignore[return-value]


def test_a_network_s_own_loss_is_differentiated_through_the_other_s_inner_steps() -> None:
    """d and g with losses (d - g)^2 / 2 and (g + d)^2 / 2, one step each, d's first: d1 = d - lr (d - g), g1 = g - lr (g + d1).

    Hence with k = 1 - lr: d1 = k d + lr g and g1 = k g - lr d1 = (k - lr^2) g - lr k d, and by the chain rule
    dL_d/dd = (d1 - g1) (k + lr k) and dL_g/dg = (g1 + d1) (k - lr^2 + lr)."""
    def first(networks: Networks, batch: Batch) -> Terms:
        d, g = players(networks, batch)
        return {"total": (d - g).square() / 2}

    def second(networks: Networks, batch: Batch) -> Terms:
        d, g = players(networks, batch)
        return {"total": (g + d).square() / 2}

    d, g, lr = 0.7, -0.4, 0.3
    batch = Batch(torch.zeros(1), torch.zeros(1), {}, {})
    found, _ = meta_gradients({"generator": Scalar(g), "discriminator": Scalar(d)},
                              [Phase("discriminator", first), Phase("generator", second)], [batch], batch,
                              lr={"generator": lr, "discriminator": lr},
                              adapted={"generator": ["value"], "discriminator": ["value"]})
    k = 1 - lr
    d1, g1 = k * d + lr * g, (k - lr**2) * g - lr * k * d
    assert found["discriminator"]["value"].item() == pytest.approx((d1 - g1) * (k + lr * k), rel=1e-5)
    assert found["generator"]["value"].item() == pytest.approx((g1 + d1) * (k - lr**2 + lr), rel=1e-5)


def query_losses(networks: dict[str, nn.Module], phases: Sequence[Phase], support: Sequence[Batch], query: Batch,
                 lr: float) -> dict[str, float]:
    """Inner loop and query losses as plainly as can be: gradients by `backward`, weights changed in place."""
    networks = copy.deepcopy(networks)
    for batch in support:
        for phase in phases:
            own = networks[phase.network]
            own.zero_grad()
            phase.loss(networks, batch)["total"].backward()
            with torch.no_grad():
                for parameter in own.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(lr * parameter.grad)
    return {phase.network: phase.loss(networks, query)["total"].item() for phase in phases}


def batch_of(count: int, seed: int) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    return Batch(pictures(count, seed=seed).double(), torch.full((count,), -1),
                 {name: latents(count, seed + i).double() for i, name in enumerate(("discriminator", "generator"))},
                 {"r1": 0.5, "r2": 0.3, "gp1": 0.2},
                 {"discriminator between": torch.rand(count, 1, dtype=torch.float64, generator=draw)})


@pytest.mark.parametrize(("model", "objective"), [
    ("mlp", "relativistic"), ("dcgan", "wasserstein"), ("resnet", "hinge"), ("r3gan", "relativistic"),
    ("style", "non_saturating")])
def test_the_meta_gradient_is_that_of_finite_differences(model: str, objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Along a direction of each network's weights, with every penalty, through two inner steps of both."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    plain = {"style": {"dim": 8, "noise": False, "mixing": 0.0}} if model == "style" else None
    g, d = small_gan(model, generator=plain)
    networks = {"generator": g.double(), "discriminator": d.double()}
    for seed, network in enumerate(networks.values()):
        stir(network, seed=seed, scale=0.1)
    phases = gan_phases(objective)
    support, query, lr = [batch_of(4, 10), batch_of(4, 20)], batch_of(3, 30), 0.05
    everything = {name: [key for key, _ in network.named_parameters()] for name, network in networks.items()}
    before = {name: copy.deepcopy(network.state_dict()) for name, network in networks.items()}
    found, first_order = (meta_gradients(networks, phases, support, query, lr=dict.fromkeys(networks, lr), adapted=everything,
                                         second_order=exact)[0] for exact in (True, False))
    for name, network in networks.items():
        assert all(torch.equal(value, before[name][key]) for key, value in network.state_dict().items())
        # Along the gradient itself, where the difference is largest against its error.
        norm = torch.stack([value.square().sum() for value in found[name].values()]).sum().sqrt()
        along = {key: value / norm for key, value in found[name].items()}
        step = 1e-6
        sides = []
        for sign in (1, -1):
            moved = copy.deepcopy(networks)
            with torch.no_grad():
                for key, parameter in moved[name].named_parameters():
                    parameter.add_(sign * step * along[key])
            sides.append(query_losses(moved, phases, support, query, lr)[name])
        assert norm.item() == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-4), name
        short = torch.stack([(first_order[name][key] * along[key]).sum() for key in along]).sum()
        assert abs(norm.item() - short.item()) > 1e-2 * norm.item(), "the second order is a good part of it"


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.differentiable and not family.fit])
def test_no_loss_hides_what_it_depends_on(family: str) -> None:
    """A loss that changes with a weight of any network has a gradient with respect to it, where the batch asks for it."""
    model = next(iter(FAMILIES[family].models))
    config = TrainingConfig(images=1, family=family, generator=GeneratorConfig(model=model, channels=4, latent_dim=LATENT),
                            discriminator=DiscriminatorConfig(channels=4))
    networks = make_networks(config, (1, 16, 16), 0)
    for network in networks.values():
        stir(network)
    phases = FAMILIES[family].phases(config.on_one_process(), NO_AUGMENTATION)
    given = Images(torch.randint(256, (4, 1, 16, 16), generator=torch.Generator().manual_seed(1)).to(torch.uint8),
                   torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), np.zeros(4, "S1"), 4)
    weights = {"r1": 1.0, "r2": 1.0, "kl": 1.0, "adversarial": 1.0}
    plan = Plan(until=4, batch=4, seed=0, latent_dim=LATENT, lr={}, weights=weights, ema_halflife_images=0.0)
    batch = replace(drawn(given, phases, plan, at=0), through=True)
    for phase in phases:
        before = phase.loss(networks, batch)["total"]
        for name, network in networks.items():
            slopes = torch.autograd.grad(before, list(network.parameters()), retain_graph=True, materialize_grads=True)
            for (key, _), slope in zip(network.named_parameters(), slopes, strict=True):
                moved = copy.deepcopy(networks)
                with torch.no_grad():
                    moved[name].get_parameter(key).add_(0.1)
                depends = abs(phase.loss(moved, batch)["total"].item() - before.item()) > 1e-5 * abs(before.item())
                assert bool(slope.any()) or not depends, (phase.network, name, key)


def test_what_it_cannot_differentiate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    g, d = small_gan("dcgan", spectral_norm=True)
    with pytest.raises(UserError, match=r"steps of the discriminator, whose .*_u changes with each pass .* use fomaml"):
        maml.refuse("gan", {"generator": g, "discriminator": d})
    with pytest.raises(UserError, match=r"torch's recurrent layers keep their weights to themselves; use fomaml"):
        maml.refuse("gan", {"generator": nn.GRU(2, 2)})
    maml.refuse("gan", dict(zip(("generator", "discriminator"), small_gan("style"), strict=True)))
    monkeypatch.setitem(FAMILIES, "stopped", replace(ONE_NETWORK, differentiable=False))
    with pytest.raises(UserError, match=r"the family stopped, whose losses stop gradients on their way; use fomaml"):
        maml.refuse("stopped", {"generator": Point()})
