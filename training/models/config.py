"""Settings of the networks: what every shape has, and a section for each shape that has settings of its own."""

from __future__ import annotations

from pydantic import Field

from training.config import Config
from training.optimizers import OptimizerConfig


class MlpConfig(Config):
    layers: int = Field(3, ge=1, description="hidden layers of `channels` units")
    pieces: int = Field(1, ge=1, description="linear pieces of a maxout unit (Goodfellow et al. 2013); 1: leaky ReLU instead")


class R3ganConfig(Config):
    blocks: int = Field(1, ge=1, description="residual blocks at each resolution; the paper has 2")
    expansion: int = Field(2, ge=1, description="a block's inner channels over its outer ones")
    group_channels: int = Field(16, ge=0, description="channels of a group of the 3 x 3 convolutions; 0: dense, faster on CPUs")


class StyleConfig(Config):
    dim: int = Field(128, ge=1, description="size of the style w that the mapping network makes of z")
    mapping_layers: int = Field(2, ge=1, description="layers of the mapping network; StyleGAN2 has 8, 2 on CIFAR-10")
    mapping_lr: float = Field(0.01, gt=0, description="learning rate of the mapping network over that of the generator")
    noise: bool = Field(True, description="add noise of learned strength after every convolution")
    mixing: float = Field(0.9, ge=0, le=1, description="share of the training images whose finer blocks take a second style")


class GeneratorConfig(OptimizerConfig):
    model: str = Field("dcgan", description="shape of the networks: a name in training/models/__init__.py; of autoencoders "
                                            "mlp or dcgan")
    channels: int = Field(64, ge=4, description="channels at full resolution, where deeper layers double it; the mlp's units")
    growth: int = Field(8, ge=1, description="deeper layers have at most so many times `channels`")
    latent_dim: int = Field(128, ge=1, description="size of the latent z ~ N(0, I)")
    miner_layers: int = Field(0, ge=0, description="layers of a miner, a small network on z before a GAN's generator "
                                                   "(MineGAN); 0: none")
    classes: int = Field(0, ge=0, description="classes that generator and discriminator are told; 0: unconditional")
    mlp: MlpConfig = MlpConfig()
    r3gan: R3ganConfig = R3ganConfig()
    style: StyleConfig = StyleConfig()


class DiscriminatorConfig(OptimizerConfig):
    channels: int = Field(64, ge=4, description="channels of the first layer; deeper layers double it; the mlp's units")
    growth: int = Field(8, ge=1, description="deeper layers have at most so many times `channels`")
    minibatch_std: int = Field(0, ge=0, description="images over which the minibatch standard deviation is taken; 0: none")
    spectral_norm: bool = Field(False, description="divide each weight by its largest singular value (Miyato et al. 2018)")
    mlp: MlpConfig = MlpConfig()
    r3gan: R3ganConfig = R3ganConfig()
