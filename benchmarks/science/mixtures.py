"""Gaussian mixtures in the plane, PacGAN's settings (Lin et al. 2018, section 4.1): which objective finds every mode?

    python -m benchmarks.science.mixtures [--steps N] [--seeds N] [--rows NAME ...] [--processes N] [--out FILE]

Ring: 8 Gaussians of sd 0.01 on the unit circle. Grid: 25 of sd 0.05 at {-4, -2, 0, 2, 4}^2. z ~ N(0, I_2), 100,000 training
points, batch 100, generator of four hidden layers, discriminator of three maxout layers of 5 pieces; 2,500 points are judged:
each counts for its nearest mode if it lies within 3 sd. Losses and penalties are graft's own functions. Other than there:
layers of 128 and 64 units instead of 400 and 200, 6,000 steps instead of 400,000; all rows have the plane divided by its sd.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.science.stacked import Discriminator, Generator
from training.draws import generator as draw
from training.loop import autocast
from training.objectives import OBJECTIVES, PENALTIES
from training.objectives.packing import pack
from training.objectives.penalties import between, squared_gradient_norms
from training.optimizers import OptimizerConfig, make_optimizer
from training.schedule import Schedule, value_at

BATCH, TRAINING_POINTS, JUDGED_POINTS = 100, 100_000, 2500
CHUNK = 50  # steps drawn at once
STEPS = 6000


@dataclass(frozen=True)
class Mixture:
    """Equal Gaussians of standard deviation ``sd`` around ``means`` (modes, 2), whose mean is 0."""

    means: Tensor
    sd: float

    @property
    def spread(self) -> float:
        """Standard deviation of a coordinate over the whole mixture."""
        return math.sqrt(float(self.means.square().mean()) + self.sd**2)

    def sample(self, points: int, generator: torch.Generator) -> Tensor:
        """(points, 2)"""
        modes = torch.randint(len(self.means), (points,), generator=generator)
        return self.means[modes] + self.sd * torch.randn(points, 2, generator=generator)


_ANGLES = torch.arange(8) * (2 * math.pi / 8)
MIXTURES = {
    "ring": Mixture(torch.stack([_ANGLES.cos(), _ANGLES.sin()], 1), 0.01),
    "grid": Mixture(torch.tensor(list(itertools.product([-4.0, -2.0, 0.0, 2.0, 4.0], repeat=2))), 0.05),
}


@dataclass(frozen=True)
class Row:
    """One line of the table: an objective and how it is trained. Schedules are of the share of training done."""

    loss: str
    penalties: dict[str, Schedule] = field(default_factory=dict)
    packed: int = 1
    lr: Schedule = 1e-4
    betas: tuple[float, float] = (0.8, 0.999)
    ema_halflife: float = 0.0  # of G's moving average, as a share of training
    hidden: tuple[int, int] = (128, 64)  # units of G's and D's hidden layers; PacGAN's 400 and 200 take six times as long
    pacgan_nets: bool = False  # batch normalisation in G, all weights N(0, 0.02^2)


def geometric(start: float, end: float, until: float, knots: int = 8) -> list[tuple[float, float]]:
    """From ``start`` to ``end`` over the first ``until`` of training in equal ratios, then ``end``."""
    return [(until * i / knots, start * (end / start) ** (i / knots)) for i in range(knots + 1)]


# A penalty of weight gamma lets D resolve distances of about 2 sqrt(gamma): at 0.05 the spread of the plane but not the modes,
# so that G's mass first spreads over all of them, at the end less than a mode's width.
_ANNEALED: Schedule = [(0.0, 0.3), *((0.15 + share, gamma) for share, gamma in geometric(0.05, 3e-4, 0.7))]
_FALLING: Schedule = [(0.7, 1e-3), (1.0, 5e-5)]


def _ours(loss: str, *penalties: str, packed: int = 1) -> Row:
    return Row(loss, dict.fromkeys(penalties, _ANNEALED), packed, lr=_FALLING, betas=(0.5, 0.99), ema_halflife=0.02)


ROWS = {
    "GAN": Row("non_saturating", pacgan_nets=True),
    "default": _ours("relativistic", "r1", "r2"),
    "PacGAN2": Row("non_saturating", packed=2, pacgan_nets=True),
    "minimax + R1": _ours("minimax", "r1"),
    "non_saturating + R1": _ours("non_saturating", "r1"),
    "least_squares + R1": _ours("least_squares", "r1"),
    "hinge + 0-GP": _ours("hinge", "gp0"),
    "WGAN-GP": Row("wasserstein", {"gp1": 0.1}, lr=_FALLING, betas=(0.5, 0.9), ema_halflife=0.02),
}


def judge(points: Tensor, mixture: Mixture) -> dict[str, float]:
    """Modes found, share of points within 3 sd of one, and KL(found | uniform) over the modes, of points (N, 2)."""
    distance, mode = torch.cdist(points.double(), mixture.means.double()).min(1)
    counts = torch.bincount(mode[distance < 3 * mixture.sd], minlength=len(mixture.means)).double()
    share = counts / counts.sum().clamp_min(1)
    kl = torch.xlogy(share, share * len(counts)).sum() if counts.sum() else torch.tensor(math.inf)
    return {"modes": float((counts > 0).sum()), "high_quality": float(counts.sum()) / len(points), "kl": float(kl)}


def train(row: Row, mixture: Mixture, seeds: Sequence[int], steps: int) -> list[dict[str, float]]:
    """Train one copy for each seed, all at once; returns each copy's scores."""
    copies, objective = len(seeds), OBJECTIVES[row.loss]
    g = Generator(seeds, hidden=row.hidden[0], batch_norm=row.pacgan_nets)
    d = Discriminator(seeds, inside=2 * row.packed, hidden=row.hidden[1], std=0.02 if row.pacgan_nets else None)
    average = copy.deepcopy(g).requires_grad_(False)
    config = OptimizerConfig(betas=row.betas)
    optimizers = {name: make_optimizer([p for p in network.parameters() if p.requires_grad], config)
                  for name, network in (("g", g), ("d", d))}
    data = torch.stack([mixture.sample(TRAINING_POINTS, draw(seed, "training points", 0)) for seed in seeds])
    data /= mixture.spread
    points = BATCH * row.packed
    rows = torch.arange(copies)[:, None]

    def judged(purpose: str) -> Tensor:
        return torch.stack([draws(seed, purpose) for seed in seeds], 1)

    def draws(seed: int, purpose: str) -> Tensor:
        return torch.randn(CHUNK, points, 2, generator=draw(seed, purpose, step))

    def packs(x: Tensor) -> Tensor:
        """(copies, N, 2) -> (copies, N / m, 2 m)"""
        return torch.stack([pack(one, row.packed) for one in x]) if row.packed > 1 else x

    def logits(x: Tensor) -> Tensor:
        """(copies * N, 2 m) -> (copies * N,): the loss functions see one batch of all copies' samples."""
        return d(x.unflatten(0, (copies, -1))).float().flatten()

    for step in range(steps):
        if step % CHUNK == 0:
            z_d, z_g = judged("discriminator"), judged("generator")
            order = torch.stack([torch.randint(TRAINING_POINTS, (CHUNK, points), generator=draw(seed, "order", step))
                                 for seed in seeds], 1)
            shares = torch.stack([torch.rand(CHUNK, BATCH, generator=draw(seed, "between", step)) for seed in seeds], 1)
        k, progress = step % CHUNK, step / steps
        weights = {name: value_at(schedule, progress) for name, schedule in row.penalties.items()}
        with autocast("auto"):
            real = packs(data[rows, order[k]]).flatten(0, 1)
            with torch.no_grad():
                fake = packs(g(z_d[k])).flatten(0, 1)
            at = {"real": real, "fake": fake, "between": between(real, fake, shares[k].flatten())}
            norms = {}
            for point in ("real", "fake"):
                at[point].requires_grad_(any(PENALTIES[name].at == point for name in weights))
            logit = {point: logits(at[point]) for point in ("real", "fake")}
            loss = objective.discriminator(logit["real"], logit["fake"])
            for name, weight in weights.items():
                point = PENALTIES[name].at
                if point not in logit:
                    logit[point] = logits(at[point].requires_grad_(True))
                if point not in norms:
                    norms[point] = squared_gradient_norms(logit[point], at[point])
                loss = loss + weight * PENALTIES[name].value(norms[point]).mean()
        _step(optimizers["d"], loss * copies, value_at(row.lr, progress))
        d.requires_grad_(False)
        with autocast("auto"):
            with torch.no_grad():
                real_logits = logits(real)
            loss = objective.generator(real_logits, logits(packs(g(z_g[k])).flatten(0, 1)))
        _step(optimizers["g"], loss * copies, value_at(row.lr, progress))
        d.requires_grad_(True)
        if row.ema_halflife:
            weight = 1 - 0.5 ** (1 / (row.ema_halflife * steps))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(g.parameters()), weight)
    return _scores(average if row.ema_halflife else g, mixture, seeds)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def _scores(g: nn.Module, mixture: Mixture, seeds: Sequence[int]) -> list[dict[str, float]]:
    z = torch.stack([torch.randn(JUDGED_POINTS, 2, generator=draw(seed, "judged", 0)) for seed in seeds])
    return [judge(points * mixture.spread, mixture) for points in g(z)]


def run(name: str, mixture: str, seeds: Sequence[int], steps: int) -> tuple[str, str, list[dict[str, float]], float]:
    """One cell of the table, in a process of its own: its row, its mixture, each seed's scores, seconds of CPU time."""
    torch.set_num_threads(1)
    started = time.process_time()
    return name, mixture, train(ROWS[name], MIXTURES[mixture], seeds, steps), time.process_time() - started


def table(results: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """Markdown: mean +- standard error over the seeds, for each row and mixture."""
    heads = [f"{name}: modes of {len(mixture.means)} | high quality % | KL" for name, mixture in MIXTURES.items()]
    lines = [f"| | seeds | {' | '.join(heads)} |", "|---|---|" + "---|" * 3 * len(MIXTURES)]
    for name, found in results.items():
        cells = [f"{_mean([s[key] * scale for s in found[m]], digits)}" if m in found else ""
                 for m in MIXTURES for key, scale, digits in (("modes", 1, 1), ("high_quality", 100, 1), ("kl", 1, 2))]
        lines.append(f"| {name} | {max(len(scores) for scores in found.values())} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(values: Sequence[float], digits: int) -> str:
    mean = sum(values) / len(values)
    if len(values) < 2 or not math.isfinite(mean):
        return f"{mean:.{digits}f}"
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of both networks")
    parser.add_argument("--seeds", type=int, help="seeds of every row; else 10 of GAN and default, 3 of others")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--processes", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/science/mixtures.json"), help="every seed's scores")
    chosen = parser.parse_args(arguments)
    seeds = {name: range(chosen.seeds or (10 if name in ("GAN", "default") else 3)) for name in chosen.rows}
    started = time.monotonic()
    results: dict[str, dict[str, list[dict[str, float]]]] = {name: {} for name in chosen.rows}
    with ProcessPoolExecutor(chosen.processes, mp_context=get_context("spawn")) as pool:
        cells = [pool.submit(run, name, mixture, seeds[name], chosen.steps) for name in chosen.rows for mixture in MIXTURES]
        for cell in as_completed(cells):
            name, mixture, scores, seconds = cell.result()
            results[name][mixture] = scores
            modes = _mean([one["modes"] for one in scores], 1)
            print(f"{name} on the {mixture}: {modes} modes, {seconds:.0f} s of CPU time", flush=True)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps({"steps": chosen.steps, "rows": results}, indent=1))
    print(f"\n{chosen.steps} steps, {time.monotonic() - started:.0f} s in all\n\n{table(results)}")


if __name__ == "__main__":
    main()
