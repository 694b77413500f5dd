"""Settings of the two networks."""

from __future__ import annotations

from pydantic import Field

from training.optimizers import OptimizerConfig


class GeneratorConfig(OptimizerConfig):
    model: str = Field("dcgan", description="shape of generator and discriminator: dcgan")
    channels: int = Field(64, ge=4, description="channels of the layer at full resolution; deeper layers double it")
    latent_dim: int = Field(128, ge=1, description="size of the latent z ~ N(0, I)")


class DiscriminatorConfig(OptimizerConfig):
    channels: int = Field(64, ge=4, description="channels of the first layer; deeper layers double it")
