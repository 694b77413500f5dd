"""What is the same for every way of stepping: networks, images, losses, and how time is taken."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import softplus

from training.models.config import DiscriminatorConfig, GeneratorConfig
from training.networks import make_networks
from training.recipe import TrainingConfig
from training.world import device

SEED, KEPT, BETAS, LR, HALF_LIFE = 0, 64, (0.0, 0.99), 2e-4, 5000.0



@dataclass(frozen=True)
class Job:
    penalties: bool  # relativistic loss with R1 and R2, else the non-saturating one without
    precision: str  # fp32, bf16, or auto: each way's own default
    batch: int  # of this process
    pixels: int
    channels: int
    width: int
    warm: int  # steps before time is taken
    steps: int
    zero: int = 0
    kind: str = "auto"
    threads: int = 1


def read_job() -> Job:
    job = Job(**json.loads(sys.argv[1]))
    torch.set_num_threads(job.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = job.precision == "auto"
    return job


def config(job: Job) -> TrainingConfig:
    return TrainingConfig(generator=GeneratorConfig(channels=job.width, latent_dim=64),
                          discriminator=DiscriminatorConfig(channels=job.width), images=1)


def networks(job: Job) -> dict[str, nn.Module]:
    return make_networks(config(job), (job.channels, job.pixels, job.pixels), SEED)


def images(job: Job) -> Iterator[Tensor]:
    """uint8 batches of this process, drawn once and then handed out in turn: nothing is waited for."""
    rank = int(os.environ.get("RANK", "0"))
    kept = torch.randint(0, 256, (KEPT, job.batch, job.channels, job.pixels, job.pixels), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(rank))
    while True:
        yield from kept


def signed(batch: Tensor) -> Tensor:
    return batch.to(device()).float() / 127.5 - 1


def latents(job: Job) -> Tensor:
    return torch.randn(job.batch, 64).to(device())


def discriminator_loss(job: Job, real: Tensor, fake: Tensor) -> Tensor:
    return softplus(fake - real).mean() if job.penalties else (softplus(fake) + softplus(-real)).mean()


def generator_loss(job: Job, real: Tensor, fake: Tensor) -> Tensor:
    return softplus(real - fake).mean() if job.penalties else softplus(-fake).mean()


def time_steps(job: Job, step: Callable[[], None]) -> None:
    """Print images/s of ``job.steps`` steps after the warm ones, and what they took of processor and memory."""
    for _ in range(job.warm):
        step()
    wait()
    began, used = time.perf_counter(), time.process_time()
    for _ in range(job.steps):
        step()
    synchronise()
    tell(job, time.perf_counter() - began, time.process_time() - used)


def wait() -> None:
    """Until every process of the group is here."""
    synchronise()
    if dist.is_initialized():
        dist.barrier()


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def tell(job: Job, seconds: float, cpu_seconds: float) -> None:
    print(json.dumps({"images_per_second": job.batch * job.steps / seconds,
                      "images_per_cpu_second": job.batch * job.steps / cpu_seconds, "state_mib": tensors_mib()}), flush=True)


def tensors_mib() -> float:
    """What all tensors of this process hold between two steps: weights, gradients, moments, averages, and the images kept."""
    gc.collect()
    held = {}
    for found in gc.get_objects():
        if type(found) in (Tensor, nn.Parameter):
            storage = found.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values()) / 2**20
