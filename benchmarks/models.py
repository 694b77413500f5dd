"""Images a second of one step of D and G, with R1 and R2, for each network shape: 32 px RGB, fp32, on this machine's CPU.

    python -m benchmarks.models [--threads 2] [--batch 32] [--seconds 10] [--channels 32]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor, nn

from training.models import make_gan
from training.models.config import DiscriminatorConfig, GeneratorConfig
from training.objectives.adversarial import relativistic
from training.objectives.penalties import squared_gradient_norms

SHAPE, LATENT, GAMMA = (3, 32, 32), 64, 1.0
DENSE: dict[str, Any] = {"r3gan": {"group_channels": 0, "expansion": 1}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("mlp", {}), "dcgan": ("dcgan", {}), "resnet": ("resnet", {}), "r3gan, grouped": ("r3gan", {}),
    "r3gan, dense": ("r3gan", DENSE), "style": ("style", {}),
}


def networks_of(case: str, channels: int) -> dict[str, nn.Module]:
    model, settings = CASES[case]
    torch.manual_seed(0)
    return make_gan(GeneratorConfig(model=model, channels=channels, latent_dim=LATENT, **settings),
                    DiscriminatorConfig(channels=channels, **settings), SHAPE)


def step(networks: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer], real: Tensor) -> None:
    """Relativistic loss with exact R1 and R2 on D, then G."""
    g, d = networks["generator"], networks["discriminator"]
    with torch.no_grad():
        fake = g(torch.randn(len(real), LATENT))
    both = torch.cat([real, fake]).requires_grad_(True)
    logits = d(both)
    real_logits, fake_logits = logits.chunk(2)
    penalty = GAMMA * squared_gradient_norms(logits, both).mean()
    optimizers["discriminator"].zero_grad()
    (relativistic.discriminator(real_logits, fake_logits) + penalty).backward()
    optimizers["discriminator"].step()
    d.requires_grad_(False)
    optimizers["generator"].zero_grad()
    relativistic.generator(d(real), d(g(torch.randn(len(real), LATENT)))).backward()
    optimizers["generator"].step()
    d.requires_grad_(True)


def images_per_second(case: str, *, batch: int, seconds: float, channels: int) -> float:
    networks = networks_of(case, channels)
    optimizers: dict[str, torch.optim.Optimizer] = {
        name: torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.0, 0.99), fused=True)
        for name, network in networks.items()}
    real = torch.rand(batch, *SHAPE) * 2 - 1
    for _ in range(3):
        step(networks, optimizers, real)
    started, steps = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        step(networks, optimizers, real)
        steps += 1
    return steps * batch / (time.monotonic() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each measurement")
    parser.add_argument("--channels", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{SHAPE[1]} px RGB, batch {options.batch}, {options.channels} channels, {options.threads} threads, fp32, torch "
          f"{torch.__version__}")
    print(f"{'model':16}{'G params':>12}{'D params':>12}{'images/s':>10}")
    for case in CASES:
        counts = [sum(p.numel() for p in network.parameters()) for network in networks_of(case, options.channels).values()]
        speed = images_per_second(case, batch=options.batch, seconds=options.seconds, channels=options.channels)
        print(f"{case:16}{counts[0]:12,}{counts[1]:12,}{speed:10.0f}")


if __name__ == "__main__":
    main()
