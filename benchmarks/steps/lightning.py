"""A GAN as Lightning's documentation writes one: manual optimisation, toggled optimizers, two losses for D added up.
Written from that recipe; no penalties and no average."""

from __future__ import annotations

import logging
import os
import time
import warnings
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy

from benchmarks.steps import job as given


class Gan(lightning.LightningModule):
    def __init__(self, job: given.Job) -> None:
        super().__init__()
        self.automatic_optimization = False
        nets = given.networks(job)
        self.job, self.g, self.d = job, nets["generator"], nets["discriminator"]

    def training_step(self, batch: Any, _index: int) -> None:
        real = batch.float() / 127.5 - 1
        generator, discriminator = self.optimizers()
        self.toggle_optimizer(generator)
        fake = self.g(given.latents(self.job).to(real))
        self.manual_backward(torch.nn.functional.softplus(-self.d(fake).float()).mean())
        generator.step()
        generator.zero_grad()
        self.untoggle_optimizer(generator)
        self.toggle_optimizer(discriminator)
        fake = self.g(given.latents(self.job).to(real)).detach()
        loss = (torch.nn.functional.softplus(-self.d(real).float()).mean()
                + torch.nn.functional.softplus(self.d(fake).float()).mean())
        self.manual_backward(loss)
        discriminator.step()
        discriminator.zero_grad()
        self.untoggle_optimizer(discriminator)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.parameters(), lr=given.LR, betas=given.BETAS) for net in (self.g, self.d)]


class Clock(lightning.Callback):
    """Takes the time of the steps after the warm ones, as for everybody else."""

    def __init__(self, job: given.Job) -> None:
        self.job, self.started = job, (0.0, 0.0)

    def on_train_batch_start(self, _trainer: Any, _module: Any, _batch: Any, batch_idx: int) -> None:
        if batch_idx == self.job.warm:
            given.wait()
            self.started = (time.perf_counter(), time.process_time())

    def on_train_end(self, *_: Any) -> None:
        given.synchronise()
        given.tell(self.job, time.perf_counter() - self.started[0], time.process_time() - self.started[1])


class Stream(torch.utils.data.IterableDataset[torch.Tensor]):
    def __init__(self, job: given.Job) -> None:
        self.job = job

    def __iter__(self) -> Any:
        return given.images(self.job)


def main() -> None:
    job = given.read_job()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = lightning.Trainer(
        accelerator="auto", devices=1 if torch.cuda.is_available() else world, max_steps=2 * (job.warm + job.steps),
        precision="bf16-mixed" if job.precision == "bf16" else "32-true", callbacks=[Clock(job)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        strategy=DDPStrategy(process_group_backend="gloo", find_unused_parameters=True) if world > 1 else "auto")
    trainer.fit(Gan(job), torch.utils.data.DataLoader(Stream(job), batch_size=None))


if __name__ == "__main__":
    main()
