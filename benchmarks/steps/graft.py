"""graft's own loop and engines, with everything that a step of pretraining does; only the images come from memory."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.steps import job as given
from data_shards import Batch
from training.ema import make_average
from training.engines import EngineConfig, make_engine
from training.families import gan_phases
from training.loop import Plan, State, train
from training.world import join_world


def main() -> None:
    job = given.read_job()
    world = join_world()
    settings, batch = given.config(job), job.batch * world.size
    engine = EngineConfig.model_validate({"kind": job.kind, "zero": job.zero})
    engines = {name: make_engine(name, network, getattr(settings, name), engine, world, batch=job.batch)
               for name, network in given.networks(job).items()}
    state = State(engines, {"generator": make_average(engines["generator"])})
    weight = float(job.penalties)
    plan = Plan(until=batch * (job.warm + job.steps), batch=batch, seed=given.SEED, latent_dim=64,
                lr={"generator": given.LR, "discriminator": given.LR}, weights={"r1": weight, "r2": weight},
                ema_halflife_images=given.HALF_LIFE, precision=job.precision)
    started: list[float] = []

    def feed() -> Iterator[Batch]:
        none = torch.full((job.batch,), -1)
        for index, images in enumerate(given.images(job)):
            if index == job.warm:
                given.wait()
                started[:] = [time.perf_counter(), time.process_time()]
            yield Batch(images, none, none, np.zeros(job.batch, "S1"), 0)

    phases = gan_phases("relativistic" if job.penalties else "non_saturating", exact=job.zero < 3)
    train(state, phases, feed(), plan, world=world)
    given.synchronise()
    given.tell(job, time.perf_counter() - started[0], time.process_time() - started[1])


if __name__ == "__main__":
    main()
