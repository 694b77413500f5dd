"""The adversarial step through the project's engines equals plain torch on the same global batches (DESIGN 7)."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from data_shards import Batch
from tests.ranks import run_ranks
from training.draws import latents
from training.ema import make_average, whole_average
from training.engines import EngineConfig, make_engine, whole_weights
from training.families import Batch as FamilyBatch
from training.families import Networks, Phase, Terms, gan_phases
from training.loop import NonFinite, Plan, State, train
from training.models.config import DiscriminatorConfig, GeneratorConfig
from training.networks import make_networks
from training.recipe import TrainingConfig
from training.world import World

BATCH, STEPS, SEED, GAMMA, LR = 8, 6, 3, 0.7, 1e-3
SHAPE = (1, 16, 16)


CLIP = 0.5  # below the norms of most gradients here


class Case(NamedTuple):
    engine: EngineConfig
    clip: float = 0.0
    precision: str = "fp32"


def engine(zero: Any, **fields: Any) -> EngineConfig:
    """Every weight is cut up under ZeRO 3: by default small ones stay whole, and a test would see nothing."""
    return EngineConfig(kind="deepspeed", zero=zero, persistence_threshold=0, **fields)


CASES = {
    "torch": Case(EngineConfig(kind="torch")),
    "torch, clipped, 4 micro-batches": Case(EngineConfig(kind="torch", accumulation=4), CLIP),
    **{f"zero {zero}": Case(engine(zero)) for zero in range(4)},
    **{f"zero {zero}, 4 micro-batches": Case(engine(zero, accumulation=4)) for zero in range(4)},
    **{f"zero {zero}, clipped": Case(engine(zero), CLIP) for zero in range(4)},
    **{f"zero {zero}, offloaded": Case(engine(zero, offload_optimizer=True, offload_parameters=zero == 3))
       for zero in range(1, 4)},
    **{f"zero {g} and {d}": Case(engine({"generator": g, "discriminator": d}))
       for g, d in [(3, 0), (3, 1), (3, 2), (1, 0), (0, 2), (2, 3)]},
    "torch, activations again": Case(EngineConfig(kind="torch", checkpoint_activations=True)),
    "zero 2, activations again": Case(engine(2, checkpoint_activations=True)),
}
RUNS = [(name, optimizer) for name in CASES for optimizer in (("sgd", "adam") if len(name) <= len("zero 0") else ("adam",))]
BF16 = Case(engine(2), precision="bf16_weights")
Weights = dict[str, dict[str, Tensor]]


def recipe(optimizer: str, engine: EngineConfig | None = None, clip: float = 0.0) -> TrainingConfig:
    common: dict[str, Any] = {"name": optimizer, "lr": LR, "channels": 8, "betas": (0.5, 0.9), "clip": clip}
    return TrainingConfig(
        generator=GeneratorConfig(latent_dim=8, **common), discriminator=DiscriminatorConfig(**common),
        engine=engine or EngineConfig(kind="torch"), images=BATCH * STEPS, batch=BATCH)


def plan(until: int = BATCH * STEPS, accumulation: int = 1, precision: str = "fp32") -> Plan:
    return Plan(until=until, batch=BATCH, seed=SEED, latent_dim=8, lr={"generator": LR, "discriminator": LR},
                weights={"r1": GAMMA, "r2": GAMMA}, ema_halflife_images=20.0, accumulation=accumulation,
                precision=precision)


def real_batches(world: World, images: int = 0) -> Iterator[Batch]:
    """A fixed global stream of uint8 images, this rank's interleaved share."""
    while True:
        pixels = torch.randint(0, 256, (BATCH, *SHAPE), generator=torch.Generator().manual_seed(images))
        share = world.slice(pixels.to(torch.uint8))
        images += BATCH
        none = torch.full((len(share),), -1)
        yield Batch(share, none, none, np.zeros(len(share), "S1"), images)


def through_engines(world: World, case: Case, optimizer: str, steps: int = STEPS) -> Weights:
    config = recipe(optimizer, case.engine, case.clip)
    networks = make_networks(config, SHAPE, SEED)
    optimizers = {"generator": config.generator, "discriminator": config.discriminator}
    engines = {name: make_engine(name, network, optimizers[name], config.engine, world, batch=BATCH // world.size,
                                 precision=case.precision) for name, network in networks.items()}
    state = State(engines, {"generator": make_average(engines["generator"])})
    train(state, gan_phases("relativistic", exact=config.exact_penalties), real_batches(world),
          plan(BATCH * steps, config.engine.accumulation, case.precision), world=world)
    result = {name: whole_weights(engine) for name, engine in engines.items()}
    result["generator_ema"] = whole_average(state.averages["generator"], engines["generator"])
    for name, engine in engines.items():
        result[f"{name}_optimizer"] = engine.optimizer_state()
        engine.close()
    return result


def held(network: nn.Module, centre: Tensor, moved: Tensor) -> Tensor:
    """The discriminator's layers by hand on ``moved`` images, its rectifiers on the side that they take on ``centre``."""
    for block in network.blocks:  # type: ignore[union-attr]  # Module.__getattr__ is untyped
        centre, moved = block(centre), block(moved)
        slope = torch.where(centre > 0, 1.0, 0.2).detach()
        centre, moved = centre * slope, moved * slope
    return network.head(moved.flatten(1))  # type: ignore[operator]


def plain_torch(optimizer: str, *, clip: float = 0.0, difference: bool = False, fault: str = "") -> Weights:
    """The same run written out by hand on the whole batch: no engine, no loop, no phase of the project.

    With ``difference`` the penalties are 2 |g| (D(x + h g/|g|) - D(x - h g/|g|)) / 2h, g held fixed, h = 0.01."""
    networks = make_networks(recipe(optimizer), SHAPE, SEED)
    g, d = networks["generator"], networks["discriminator"]
    average = copy.deepcopy(g)
    kind = {"sgd": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.5),
            "adam": lambda p: torch.optim.Adam(p, lr=LR, betas=(0.5, 0.9))}[optimizer]
    optimizer_g, optimizer_d = kind(g.parameters()), kind(d.parameters())
    stream = real_batches(World())
    for step in range(STEPS):
        real = next(stream).images.float() / 127.5 - 1
        fake = g(latents(SEED, "discriminator", step * BATCH, BATCH, 8)).detach().requires_grad_(True)
        real.requires_grad_(True)
        d_real, d_fake = d(real), d(fake)
        loss = torch.log1p(torch.exp(d_fake - d_real)).mean()
        for images, logits in ((real, d_real), (fake, d_fake)):
            (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
            if difference:
                gradient = gradient.detach()
                norm = gradient.pow(2).sum(dim=(1, 2, 3)).sqrt()
                centre, shift = images.detach(), 0.01 * gradient / norm.view(-1, 1, 1, 1)
                slope = (held(d, centre, centre + shift) - held(d, centre, centre - shift)) / 0.02
                loss = loss + GAMMA / 2 * (2 * norm * slope).mean()
            else:
                loss = loss + GAMMA / 2 * gradient.pow(2).sum(dim=(1, 2, 3)).mean()
        optimizer_d.zero_grad()
        if fault == "the real half's gradient is lost":
            loss = softplus(d_fake - d_real.detach()).mean()
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(d.parameters(), clip)
        optimizer_d.step()
        fake = g(latents(SEED, "generator", step * BATCH, BATCH, 8))
        loss = torch.log1p(torch.exp(d(real.detach()) - d(fake))).mean()
        optimizer_g.zero_grad()
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(g.parameters(), clip)
        optimizer_g.step()
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), g.parameters(), strict=True):
                mean.copy_(mean * 0.5 ** (BATCH / 20) + parameter * (1 - 0.5 ** (BATCH / 20)))
    return {name: {k: v.detach().clone() for k, v in network.state_dict().items()}
            for name, network in (("generator", g), ("discriminator", d), ("generator_ema", average))}


def distance(optimizer: str, ours: dict[str, dict[str, Tensor]], reference: dict[str, dict[str, Tensor]]) -> float:
    """The largest excess over DESIGN 7's bound, in units of the bound: <= 1 is equal.

    SGD: the difference's norm over 1e-6 of the weights' norm. Adam: the largest difference over 1e-3 of the largest movement.
    """
    start = make_networks(recipe(optimizer), SHAPE, SEED)
    start["generator_ema"] = start["generator"]
    worst = 0.0
    for name in ("generator", "discriminator", "generator_ema"):
        flat = [torch.cat([weights[k].flatten() for k in sorted(weights)])
                for weights in (ours[name], reference[name], start[name].state_dict())]
        difference = flat[0] - flat[1]
        if optimizer == "sgd":
            worst = max(worst, float(difference.norm() / (1e-6 * flat[1].norm())))
        else:
            worst = max(worst, float(difference.abs().max() / (1e-3 * (flat[1] - flat[2]).abs().max())))
    return worst


def every_case(world: World) -> dict[str, Weights]:
    """All engines and optimizers one after another in one group, and the public tutorial's two backwards."""
    results = {f"{name}-{optimizer}": through_engines(world, CASES[name], optimizer) for name, optimizer in RUNS}
    results["two backwards"] = two_backwards(world)
    results["bf16 weights"] = through_engines(world, BF16, "sgd")
    return results


def two_backwards(world: World) -> Weights:
    """The loss in two halves, a backward each, one step: what the DeepSpeed GAN tutorial does."""
    from training.engines.deepspeed import DeepSpeedEngine

    def halves(self: DeepSpeedEngine, loss: Tensor) -> None:
        self.engine.backward(loss * 0.5, retain_graph=True)
        self.engine.backward(loss * 0.5)
        self.micro_batches = 1

    original, DeepSpeedEngine.backward = DeepSpeedEngine.backward, halves  # type: ignore[method-assign]
    try:
        return through_engines(world, CASES["zero 2"], "sgd")
    finally:
        DeepSpeedEngine.backward = original  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Weights]]:
    return run_ranks(every_case, 2)


@pytest.mark.parametrize(("name", "optimizer"), RUNS)
def test_two_ranks_equal_plain_torch(two_ranks: list[dict[str, Weights]], name: str, optimizer: str) -> None:
    case = CASES[name]
    reference = plain_torch(optimizer, clip=case.clip, difference=case.engine.stage("discriminator") == 3)
    for rank in two_ranks:
        assert distance(optimizer, rank[f"{name}-{optimizer}"], reference) <= 1


def test_the_finite_difference_is_the_double_backward_too(two_ranks: list[dict[str, Weights]]) -> None:
    """Rectifiers that keep their side make the difference exact but for rounding."""
    assert distance("sgd", two_ranks[0]["zero 3-sgd"], plain_torch("sgd")) < 5


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_one_process_equals_plain_torch(optimizer: str) -> None:
    assert distance(optimizer, through_engines(World(), CASES["torch"], optimizer), plain_torch(optimizer)) <= 1


def test_bf16_weights_have_fp32_masters_and_average(two_ranks: list[dict[str, Weights]]) -> None:
    """The masters move as those of a hand-written bf16 run, and neither they nor their average are rounded to bf16."""
    reference, start = bf16_by_hand(), make_networks(recipe("sgd"), SHAPE, SEED)
    start["generator_ema"] = start["generator"]
    for name in ("generator", "discriminator", "generator_ema"):
        ours, theirs, first = (torch.cat([weights[k].flatten() for k in sorted(weights)]) for weights in (
            two_ranks[0]["bf16 weights"][name], reference[name], start[name].state_dict()))
        assert (ours - theirs).norm() < 0.05 * (theirs - first).norm()
        assert (ours != ours.bfloat16().float()).float().mean() > 0.5


def bf16_by_hand() -> Weights:
    """SGD of fp32 masters by the gradients of their bf16 copies, in one process."""
    networks = make_networks(recipe("sgd"), SHAPE, SEED)
    masters = {name: {k: v.detach().clone() for k, v in network.state_dict().items()} for name, network in networks.items()}
    momenta = {name: {k: torch.zeros_like(v) for k, v in named.items()} for name, named in masters.items()}
    average = {k: v.clone() for k, v in masters["generator"].items()}
    g, d = (networks[name].bfloat16() for name in ("generator", "discriminator"))
    stream = real_batches(World())

    def step(name: str, loss: Tensor) -> None:
        for (k, parameter), gradient in zip(networks[name].named_parameters(), torch.autograd.grad(
                loss, list(networks[name].parameters())), strict=True):
            momenta[name][k] = 0.5 * momenta[name][k] + gradient.float()
            masters[name][k] -= LR * momenta[name][k]
            parameter.data.copy_(masters[name][k])

    for i in range(STEPS):
        real = (next(stream).images.float() / 127.5 - 1).requires_grad_(True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fake = g(latents(SEED, "discriminator", i * BATCH, BATCH, 8)).detach().float().requires_grad_(True)
            logits = [d(real), d(fake)]
            loss = softplus(logits[1].float() - logits[0].float()).mean()
            for images, values in zip((real, fake), logits, strict=True):
                (gradient,) = torch.autograd.grad(values.sum(), images, create_graph=True)
                loss = loss + GAMMA / 2 * gradient.float().pow(2).sum(dim=(1, 2, 3)).mean()
        step("discriminator", loss)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fake = g(latents(SEED, "generator", i * BATCH, BATCH, 8))
            loss = softplus(d(real.detach()).detach().float() - d(fake).float()).mean()
        step("generator", loss)
        for k in average:
            average[k] = average[k] * 0.5 ** (BATCH / 20) + masters["generator"][k] * (1 - 0.5 ** (BATCH / 20))
    return {**masters, "generator_ema": average}


@pytest.mark.slow
def test_a_compiled_generator_equals_plain_torch() -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs g++ on the CPU")
    case = Case(EngineConfig(kind="torch", compile=("generator",)))
    assert distance("adam", through_engines(World(), case, "adam"), plain_torch("adam")) <= 1


@pytest.mark.parametrize("change", [{"clip": 0.0}, {"difference": True}])
def test_clipping_and_penalties_matter_here(change: dict[str, Any]) -> None:
    """Else the cases above would not notice that they were left out."""
    reference = plain_torch("sgd", clip=CLIP)
    assert distance("sgd", plain_torch("sgd", **{"clip": CLIP, **change}), reference) > (100 if "clip" in change else 0.01)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_lost_gradient_exceeds_the_bounds_a_hundredfold(optimizer: str) -> None:
    faulty = plain_torch(optimizer, fault="the real half's gradient is lost")
    assert distance(optimizer, faulty, plain_torch(optimizer)) > 100


def test_two_backwards_through_zero_are_noticed(two_ranks: list[dict[str, Weights]]) -> None:
    """ZeRO 2 forgets the first half of a gradient without a word; the comparison must not."""
    assert distance("sgd", two_ranks[0]["two backwards"], plain_torch("sgd")) > 100


def test_ranks_end_with_the_same_weights(two_ranks: list[dict[str, Weights]]) -> None:
    first, second = (rank["zero 2-adam"] for rank in two_ranks)
    for name in ("generator", "discriminator", "generator_ema", "generator_optimizer"):
        assert all(torch.equal(first[name][k], second[name][k]) for k in first[name])


def from_memory_full_of_nan(world: World) -> bool:
    """Whether what ZeRO 3 cuts up is finite where new memory holds NaN; three ranks need padding."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills what torch.empty gives with NaN
    assert torch.empty(1).isnan()
    case = CASES["zero 3"]
    config = recipe("adam", case.engine)
    network = make_networks(config, SHAPE, SEED)["discriminator"]
    cut = make_engine("discriminator", network, config.discriminator, config.engine, world, batch=BATCH // world.size)
    finite = all(bool(torch.isfinite(values).all()) for values in cut.masters())
    cut.close()
    return finite


def test_padding_of_cut_weights_does_not_hold_what_memory_held() -> None:
    assert run_ranks(from_memory_full_of_nan, 3) == [True] * 3


def test_ranks_draw_different_noise() -> None:
    z = [latents(SEED, "generator", 64, BATCH, 8, World(rank, 2)) for rank in range(2)]
    assert torch.equal(torch.stack(z, 1).flatten(0, 1), latents(SEED, "generator", 64, BATCH, 8))
    assert not (z[0][:, None] == z[1][None]).all(-1).any()
    assert not torch.equal(latents(SEED, "generator", 0, BATCH, 8), latents(SEED, "discriminator", 0, BATCH, 8))


def optimizer_state_after(world: World, zero: int | None, state: dict[str, Tensor], steps: int) -> dict[str, Any]:
    """Load an optimizer state, read it back at once, then take steps with a fixed gradient; the plain engine for None."""
    config = recipe("adam", engine(zero) if zero is not None else None)
    network = make_networks(config, SHAPE, SEED)["discriminator"]
    stepper = make_engine("discriminator", network, config.discriminator, config.engine, world, batch=4, state=state or None)
    first = stepper.optimizer_state() if state else {}
    for step in range(steps):
        images = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(step))
        stepper.backward(network(world.slice(images)).square().mean())
        stepper.step(LR)
    result = {"read_back": first, "state": stepper.optimizer_state(), "weights": whole_weights(stepper)}
    stepper.close()
    return result


@pytest.mark.parametrize(("size", "zero"), [(2, 2), (3, 1), (2, 0), (2, 3), (3, 3)])
def test_optimizer_state_moves_to_any_world_size_and_stage(size: int, zero: int) -> None:
    """Saved by one plain process, loaded under ZeRO on several ranks: the same state, and the same next step."""
    saved = optimizer_state_after(World(), None, {}, 2)["state"]
    expected = optimizer_state_after(World(), None, saved, 1)
    if size == 3:  # 8 images do not divide by 3: only the state is compared
        for rank in run_ranks(optimizer_state_after, size, zero, saved, 0):
            assert rank["read_back"].keys() == saved.keys()
            assert all(torch.equal(rank["read_back"][k], saved[k]) for k in saved)
        return
    for rank in run_ranks(optimizer_state_after, size, zero, saved, 1):
        assert all(torch.equal(rank["read_back"][k], saved[k]) for k in saved)
        for name, weights in expected["weights"].items():
            torch.testing.assert_close(rank["weights"][name], weights, rtol=0, atol=1e-3 * LR)


@pytest.mark.parametrize("kind", ["torch", "deepspeed"])
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_step_whose_gradient_is_not_finite_changes_nothing(kind: str, zero: int) -> None:
    if kind == "torch" and zero:
        pytest.skip("the plain engine has no stages")
    config = recipe("adam", engine(zero) if kind == "deepspeed" else None)
    network = make_networks(config, SHAPE, SEED)["discriminator"]
    stepper = make_engine("discriminator", network, config.discriminator, config.engine, World(), batch=4)
    images = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    for broken in (False, True):
        before, moments = whole_weights(stepper), stepper.optimizer_state()
        stepper.backward(network(images).square().mean() * (float("nan") if broken else 1.0))
        norm = stepper.step(LR)
        after = whole_weights(stepper)
        assert bool(torch.isfinite(norm)) is not broken
        assert all(torch.equal(before[k], after[k]) for k in before) is broken
    assert all(torch.equal(moments[k], value) for k, value in stepper.optimizer_state().items())
    stepper.close()


def test_l1_is_the_gradient_of_the_sum_of_absolute_weights() -> None:
    config = DiscriminatorConfig(name="sgd", channels=8, betas=(0.0, 0.0), l1=0.3)
    network = make_networks(recipe("sgd"), SHAPE, SEED)["discriminator"]
    expected = copy.deepcopy(network)
    images = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    stepper = make_engine("discriminator", network, config, EngineConfig(kind="torch"), World(), batch=4)
    stepper.backward(network(images).square().mean())
    stepper.step(LR)
    loss = expected(images).square().mean() + 0.3 * sum(p.abs().sum() for p in expected.parameters())
    for (name, parameter), gradient in zip(expected.named_parameters(), torch.autograd.grad(
            loss, list(expected.parameters())), strict=True):
        torch.testing.assert_close(dict(network.named_parameters())[name], parameter - LR * gradient, rtol=0, atol=1e-7)


def test_fp16_scales_its_loss_down_on_overflow_and_ends_near_fp32() -> None:
    result = through_engines(World(), Case(EngineConfig(kind="torch"), precision="fp16"), "sgd")
    assert 2**-4 <= float(result["discriminator_optimizer"]["loss_scale"]) <= 2**16
    reference, start = plain_torch("sgd"), make_networks(recipe("sgd"), SHAPE, SEED)
    for name, network in start.items():
        ours, theirs, first = (torch.cat([w[k].flatten() for k in sorted(w)])
                               for w in (result[name], reference[name], network.state_dict()))
        assert (ours - theirs).norm() < 0.1 * (theirs - first).norm()


def test_the_generator_can_step_less_often() -> None:
    config = recipe("sgd")
    networks = make_networks(config, SHAPE, SEED)
    engines = {name: make_engine(name, network, config.generator, config.engine, World(), batch=BATCH)
               for name, network in networks.items()}
    moved = []
    for images in range(0, BATCH * 6, BATCH):
        before = {name: whole_weights(stepper) for name, stepper in engines.items()}
        train(State(engines, {}, images=images), gan_phases("relativistic"), real_batches(World(), images),
              replace(plan(images + BATCH), every={"generator": 3}))
        moved.append([not all(torch.equal(before[name][k], v) for k, v in whole_weights(engines[name]).items())
                      for name in ("discriminator", "generator")])
    assert moved == [[True, i % 3 == 0] for i in range(6)]


def broken_after(images: int, times: int) -> Phase:
    """A phase whose loss is not a number for ``times`` steps from the latent draw of ``images`` on."""
    good = gan_phases("relativistic")[0]
    first = latents(SEED, "discriminator", images, BATCH, 8)[0, 0]
    left = [times]

    def loss(networks: Networks, batch: FamilyBatch) -> Terms:
        terms = good.loss(networks, batch)
        if (left[0] < times or torch.equal(batch.latents["discriminator"][0, 0], first)) and left[0] > 0:
            left[0] -= 1
            terms["total"] = terms["total"] * float("nan")
        return terms

    return Phase("discriminator", loss)


@pytest.mark.parametrize(("times", "rescues", "scale"), [(1, 3, 0.5), (4, 3, 0.25), (4, 1, None)])
def test_steps_left_out_halve_the_rates_a_bounded_number_of_times(times: int, rescues: int, scale: float | None) -> None:
    """Reports come every three steps; the steps 1 to ``times`` are broken."""
    config = recipe("sgd")
    networks = make_networks(config, SHAPE, SEED)
    engines = {name: make_engine(name, network, config.generator, config.engine, World(), batch=BATCH)
               for name, network in networks.items()}
    state, reports = State(engines, {}), []
    settings = replace(plan(BATCH * 9), rescues=rescues, report_every_images=BATCH * 3)

    def run() -> None:
        train(state, [broken_after(BATCH, times)], real_batches(World()), settings,
              report=lambda _, metrics: reports.append(metrics))

    if scale is None:
        with pytest.raises(NonFinite, match="the learning rates having been halved 1 times"):
            run()
        return
    run()
    assert state.lr_scale == scale
    assert sum(metrics.get("skipped_steps", 0.0) for metrics in reports) == times
    assert all(math.isfinite(value) for metrics in reports for value in metrics.values())
