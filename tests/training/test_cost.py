"""FLOPs against closed forms, and shares of time that add up."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.ranks import run_ranks
from tests.toy import toy_recipe, toy_set
from training.augment import AugmentConfig
from training.cost import (
    PEAK_TFLOPS,
    SHARES,
    Clock,
    blank_batch,
    cost_line,
    peak_flops,
    peak_memory,
    step_flops,
    timed_collectives,
)
from training.engines import EngineConfig, make_engine
from training.events import read_events
from training.families import Batch, Phase, gan_phases
from training.objectives.penalties import squared_gradient_norms
from training.optimizers import OptimizerConfig
from training.pretrain import pretrain
from training.world import World

N = 6


def one_phase(network: nn.Module, images: tuple[int, int, int], *, gradient: bool = False) -> float:
    def loss(networks: dict[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
        inputs = batch.images.requires_grad_(gradient)
        return {"total": networks["net"](inputs).square().mean()}

    phases = [Phase("net", loss)]  # type: ignore[arg-type]
    return step_flops(phases, {"net": network}, blank_batch(phases, images, 1, {}, N))


def test_flops_of_convolutions_against_the_closed_form() -> None:
    two = nn.Sequential(nn.Conv2d(3, 8, 4, stride=2, padding=1), nn.LeakyReLU(), nn.Conv2d(8, 5, 3, padding=1))
    first = 2 * 3 * 8 * 4 * 4 * 8 * 8 * N  # 2 Cin Cout k k Hout Wout N
    second = 2 * 8 * 5 * 3 * 3 * 8 * 8 * N
    # Backward: the weights' gradient and the inputs', each as much as the forward; the images need none.
    assert one_phase(two, (3, 16, 16)) == 2 * first + 3 * second
    assert one_phase(two, (3, 16, 16), gradient=True) == 3 * first + 3 * second
    up = nn.ConvTranspose2d(4, 7, 4, stride=2, padding=1)
    assert one_phase(up, (4, 8, 8), gradient=True) == 3 * 2 * 4 * 7 * 4 * 4 * 8 * 8 * N  # of the input's size here
    grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
    assert one_phase(grouped, (8, 8, 8), gradient=True) == 3 * 2 * 8 * 8 // 4 * 3 * 3 * 8 * 8 * N
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert one_phase(linear, (1, 8, 8)) == 2 * 2 * 64 * 10 * N


def test_a_penaltys_double_backward_is_counted() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 1, bias=False), nn.Flatten(0))

    def loss(networks: dict[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
        images = batch.images.requires_grad_(True)
        logits = networks["net"](images)
        return {"total": logits.mean() + squared_gradient_norms(logits, images).mean()}

    phases = [Phase("net", loss)]  # type: ignore[arg-type]
    product = 2 * 64 * N
    # D(x); its gradient in x; and backward through D(x) to weights and x, through the gradient to the weights.
    assert step_flops(phases, {"net": network}, blank_batch(phases, (1, 8, 8), 1, {}, N)) == 5 * product


def test_a_gans_step_grows_with_its_penalties_and_leaves_its_networks_alone() -> None:
    torch.manual_seed(0)
    networks = {"generator": nn.Sequential(nn.Linear(4, 64), nn.Unflatten(1, (1, 8, 8))),
                "discriminator": nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0))}
    phases = gan_phases("relativistic")
    found = [step_flops(phases, networks, blank_batch(phases, (1, 8, 8), 4, {"r1": r1, "r2": 0.0}, N)) for r1 in (0.0, 1.0)]
    g, d = 2 * 4 * 64 * N, 2 * 64 * N
    # D's phase: G once, D on real and fake and their weights' gradient. G's: G and its weights' gradient, D on real, D on fake
    # and the images' gradient (D is frozen).
    assert found[0] == (g + 2 * d + 2 * d) + (g + g + d + d + d)
    assert found[1] > found[0]
    blank = blank_batch(phases, (1, 8, 8), 4, {"r1": 0.0, "r2": 0.0}, N)
    assert step_flops(phases, networks, blank, {"generator": 2}) == (g + 4 * d) + (2 * g + 3 * d) / 2
    augmentation = AugmentConfig(kind="diffaugment")
    for exact in (True, False):  # finite differences as under ZeRO 3
        penalised = gan_phases("relativistic", exact=exact, augmentation=augmentation)
        blank = blank_batch(penalised, (1, 8, 8), 4, {"r1": 1.0, "r2": 1.0, "augment": 1.0}, N)
        assert step_flops(penalised, networks, blank) > found[0]
    assert all(p.grad is None and p.device.type == "cpu" and p.requires_grad for n in networks.values() for p in n.parameters())


def test_shares_are_disjoint_and_at_most_one() -> None:
    clock = Clock()
    feed = clock.each("data", iter(range(3)))
    with clock.timed("checkpoint"):  # sleeps that are long beside what a busy machine adds to them
        time.sleep(0.3)
        with clock.timed("communication"):
            time.sleep(0.3)
    next(feed)
    time.sleep(0.2)
    shares = clock.shares()
    assert shares["communication"] == 0.0, "inside a checkpoint it is the checkpoint's"
    assert 0.5 < shares["checkpoint"] < 1 and sum(shares.values()) <= 1
    assert set(clock.shares().values()) == {0.0}, "begun anew"


def communicate(world: World, kind: str, zero: int) -> dict[str, float]:
    network = nn.Linear(300, 300)
    engine = make_engine("net", network, OptimizerConfig(lr=1e-3), EngineConfig(kind=kind, zero=zero), world, batch=2)
    original, clock = dist.all_reduce, Clock()
    with timed_collectives(clock):
        for _ in range(3):
            time.sleep(0.5 * world.rank)  # rank 0 waits for it
            engine.backward(network(torch.ones(2, 300)).mean())
            engine.step(1e-3)
    assert dist.all_reduce is original
    engine.close()
    return clock.shares()


@pytest.mark.parametrize(("kind", "zero"), [("torch", 0), ("deepspeed", 0), ("deepspeed", 2)])
def test_waiting_for_a_slow_rank_is_communication(kind: str, zero: int) -> None:
    fast, slow = run_ranks(communicate, 2, kind, zero)
    assert fast["communication"] > 0.4 and slow["communication"] < fast["communication"]
    assert sum(fast.values()) <= 1


def test_a_pretraining_logs_its_cost_and_sums_it_up(tmp_path: Path) -> None:
    source = toy_set(tmp_path / "source")
    pretrain(toy_recipe(tmp_path), source, tmp_path / "run", World())
    log = read_events(tmp_path / "run" / "pretrain" / "events.jsonl")
    for event in log:
        metrics = event["metrics"]
        assert sum(metrics[f"cost/{name}"] for name in SHARES) <= 1 and all(metrics[f"cost/{n}"] >= 0 for n in SHARES)
        assert metrics["cost/gflop_per_image"] > 0 and 0 < metrics["cost/peak_memory_gb"] <= peak_memory() / 1e9
        assert metrics["cost/tflops"] > 0 and 0 < metrics["cost/share_of_peak"] < 1
    assert log[2]["metrics"]["cost/checkpoint"] > 0
    assert "GFLOP an image" in cost_line(log, 8)


def test_the_line_weighs_by_time_and_skips_what_measured_nothing() -> None:
    def event(images: int, rate: float, wait: float) -> dict[str, object]:
        return {"images": images, "metrics": {
            "images_per_second": rate, "cost/data": wait, "cost/checkpoint": 0.0, "cost/health": 0.0, "cost/share_of_peak": 0.5,
            "cost/gflop_per_image": 2.0, "cost/peak_memory_gb": rate / 100, "cost/peak_measured": 1.0}}

    log = [event(100, 100.0, 0.0), {"images": 100, "metrics": {"health/rollbacks": 1.0}}, event(200, 100 / 3, 0.4)]
    assert cost_line(log, 8) == (
        "2 GFLOP an image, 16 a step; 50 images/s, 0.1 TFLOP/s, 50 % of what a matrix product reaches here; of the time: "
        "data 30.0 %, checkpoint 0.0 %, health 0.0 %; peak memory 1.00 GB a worker")
    assert cost_line([], 8) == ""


def test_the_peak_is_the_data_sheets_or_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, here = peak_flops("fp32")
    assert here and 1e9 < measured < 1e14
    monkeypatch.setattr("training.cost.device", lambda: torch.device("cuda", 0))
    for name, part in (("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H200", "H200"),
                       ("NVIDIA A100-SXM4-80GB", "A100")):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _place, name=name: name)
        assert peak_flops("bf16") == (PEAK_TFLOPS[part]["bf16"] * 1e12, False)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        assert peak_flops("fp32") == (PEAK_TFLOPS[part]["fp32"] * 1e12, False)
