"""Augmentation of what the discriminator sees, real and generated images alike, in its step and in the generator's.

Without that in the generator's step too, G would learn the augmented images (Zhao et al. 2020, section 3.1). Real and generated
images get independent draws, as in both papers' code. Each draw is a function of (seed, purpose, images seen) for the global
batch. p = 0 returns the images themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from training.augment.ada import DRAWS as ADA_DRAWS
from training.augment.ada import TRANSFORMS as ADA_TRANSFORMS
from training.augment.ada import ada
from training.augment.diffaugment import DRAWS as DIFFAUGMENT_DRAWS
from training.augment.diffaugment import TRANSFORMS as DIFFAUGMENT_TRANSFORMS
from training.augment.diffaugment import diffaugment
from training.augment.strength import Strength, adjust, read_strength
from training.config import Config, one_of
from training.schedule import Schedule, check_schedule, largest_value, value_at

__all__ = ["AUGMENTATIONS", "NO_AUGMENTATION", "AugmentConfig", "Strength", "adjust", "augment", "read_strength", "steer",
           "strength_at"]


class Augmentation(NamedTuple):
    """``apply(images, draws, p, transforms)`` with ``draws`` numbers of U[0, 1) for each image."""

    apply: Callable[..., Tensor]
    draws: int
    transforms: tuple[str, ...]


AUGMENTATIONS = {
    "diffaugment": Augmentation(diffaugment, DIFFAUGMENT_DRAWS, DIFFAUGMENT_TRANSFORMS),
    "ada": Augmentation(ada, ADA_DRAWS, ADA_TRANSFORMS),
}


class AugmentConfig(Config):
    kind: str | None = Field(
        None, description=f"augmentation of real and generated images: {', '.join(AUGMENTATIONS)}; null: none")
    transforms: list[str] | None = Field(None, description="which of the kind's transforms; null: all")
    p: Schedule | Literal["adaptive"] = Field(
        1.0, description="probability of each transform; adaptive: ADA's controller, which starts from 0")
    target: float = Field(0.6, ge=-1, le=1, description="adaptive: the mean sign of D on real images that p steers to")
    speed_images: float = Field(500_000, gt=0, description="adaptive: images in which p can go from 0 to 1")
    limit: float = Field(0.8, ge=0, le=1, description="adaptive: p stays below; over 0.8 G begins to learn the augmentation")

    @field_validator("kind")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        return name if name is None else one_of(lambda: AUGMENTATIONS, "augmentation")(cls, name)

    @field_validator("p")
    @classmethod
    def _probability(cls, p: Schedule | str) -> Schedule | str:
        if isinstance(p, str):
            return p
        if largest_value(check_schedule(p)) > 1:
            raise ValueError("a probability is at most 1")
        return p

    @model_validator(mode="after")
    def _transforms(self) -> AugmentConfig:
        known = AUGMENTATIONS[self.kind].transforms if self.kind else ()
        if self.transforms and self.kind is None:
            raise ValueError(f"transforms need a kind, which is null; set kind to one of {', '.join(AUGMENTATIONS)}")
        for name in self.transforms or ():
            if name not in known:
                raise ValueError(f"there is no transform {name} in {self.kind}; known: {', '.join(known)}")
        return self

    @property
    def adaptive(self) -> bool:
        return self.kind is not None and self.p == "adaptive"


    def draws(self) -> int:
        """Numbers of U[0, 1) that one image's augmentation takes."""
        return AUGMENTATIONS[self.kind].draws if self.kind else 0


NO_AUGMENTATION = AugmentConfig()


def strength_at(config: AugmentConfig, state: Strength, images: int) -> float:
    """The probability p after ``images`` images; 0 without augmentation."""
    if config.kind is None:
        return 0.0
    return state.p if isinstance(config.p, str) else value_at(config.p, images)


def steer(config: AugmentConfig, state: Strength, sign: float, batch: int) -> Strength:
    """The state after a step of ``batch`` images, ``sign`` the mean of D's sign on its real images, over all ranks."""
    return adjust(state, sign, batch=batch, target=config.target, speed_images=config.speed_images, limit=config.limit)


def augment(config: AugmentConfig, images: Tensor, draws: Tensor, p: float) -> Tensor:
    """Images (N, C, H, W) in [-1, 1], each transform applied to each with probability ``p``; 0 gives the images themselves.

    Args:
        draws: (N, ``config.draws()``) of U[0, 1), float64.
    """
    if config.kind is None or p == 0:
        return images
    kind = AUGMENTATIONS[config.kind]
    transforms = kind.transforms if config.transforms is None else tuple(config.transforms)
    with torch.autocast(images.device.type, enabled=False):
        return kind.apply(images.float(), draws, p, transforms)
