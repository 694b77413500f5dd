"""DeepSpeed's public GAN tutorial (deepspeed.ai/tutorials/gan): two engines from one JSON of batch size and Adam, D's two
halves each with a backward of its own. Written from its description; it has no penalties and no average."""

from __future__ import annotations

import logging
import os

import deepspeed
import torch

from benchmarks.steps import job as given


def main() -> None:
    job = given.read_job()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
    settings = {"train_micro_batch_size_per_gpu": job.batch, "steps_per_print": 10**9, "gradient_clipping": 0.0,
                "optimizer": {"type": "Adam", "params": {"lr": given.LR, "betas": list(given.BETAS), "eps": 1e-8,
                                                         "torch_adam": True}}}
    if job.precision == "bf16":
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    nets = given.networks(job)
    engines = [deepspeed.initialize(model=nets[name], model_parameters=nets[name].parameters(), config=settings)[0]
               for name in ("discriminator", "generator")]
    d, g = engines
    stream = given.images(job)

    def step() -> None:
        real = given.signed(next(stream))
        d.zero_grad()
        d.backward(torch.nn.functional.softplus(-d(real).float()).mean())
        fake = g(given.latents(job)).float()
        d.backward(torch.nn.functional.softplus(d(fake.detach()).float()).mean())
        d.step()
        # The tutorial calls D's engine here, which this version refuses without ZeRO; its network is what runs either way.
        nets["discriminator"].requires_grad_(False)
        g.zero_grad()
        with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16, enabled=job.precision == "bf16"):
            judged = nets["discriminator"](fake)
        g.backward(torch.nn.functional.softplus(-judged.float()).mean())
        g.step()
        nets["discriminator"].requires_grad_(True)

    given.time_steps(job, step)


if __name__ == "__main__":
    os.environ.setdefault("LOCAL_RANK", os.environ.get("RANK", "0"))
    main()
