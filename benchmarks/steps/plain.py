"""A GAN's training loop as one writes it by hand in plain torch, for one process: the measure of graft's own cost."""

from __future__ import annotations

import copy

import torch

from benchmarks.steps import job as given
from training.world import device, has_bf16


def main() -> None:
    job = given.read_job()
    nets = given.networks(job)
    g, d = nets["generator"], nets["discriminator"]
    average = copy.deepcopy(g).requires_grad_(False)
    stream = given.images(job)
    optimizers = [torch.optim.Adam(net.parameters(), lr=given.LR, betas=given.BETAS, fused=True) for net in (d, g)]
    bf16 = job.precision == "bf16" or (job.precision == "auto" and has_bf16())
    weight = 1 - 0.5 ** (job.batch / given.HALF_LIFE)

    def step() -> None:
        real = given.signed(next(stream))
        with torch.autocast(device().type, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                fake = g(given.latents(job)).float()
            both = torch.cat([real, fake]).requires_grad_(job.penalties)
            judged = d(both)
            loss = given.discriminator_loss(job, *judged.float().chunk(2))
            if job.penalties:
                (slope,) = torch.autograd.grad(judged.sum(), both, create_graph=True)
                loss = loss + slope.square().sum() / (2 * len(real))
        loss.backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        d.requires_grad_(False)
        with torch.autocast(device().type, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                real_logits = d(real).float() if job.penalties else torch.zeros(())
            loss = given.generator_loss(job, real_logits, d(g(given.latents(job))).float())
        loss.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        d.requires_grad_(True)
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(g.parameters()), weight)

    given.time_steps(job, step)


if __name__ == "__main__":
    main()
