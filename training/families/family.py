"""What a family of generative models is: networks, and the phases that train them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from training.augment import AugmentConfig
from training.families.phase import Phase
from training.models import MODELS
from training.models.layers import Shape

if TYPE_CHECKING:
    from training.recipe import TrainingConfig


@dataclass(frozen=True)
class Family:
    """Every family has a network "generator", z (N, latent_dim) -> samples (N, *shape) in [-1, 1], whose moving average is what
    is sampled, scored and adapted; a network's section of the recipe, its optimizer included, has the network's name.
    Where it ``translates``, the generator maps images of a set to another's instead.

    Args:
        names: of the networks.
        networks: fresh ones, drawn from torch's default generator.
        phases: in the order in which a step runs them.
        shown: the terms that a line of progress shows, by what they are called there.
        models: shapes that its networks can have, by the names that `training.generator.model` may be; empty: it reads none.
        translates: it is trained on two sets, ``data.source`` and ``data.translate_to``, and makes no images from latents.
        refuse: raises `ValueError` for settings that the family cannot serve.
        drawn: samples uint8 (N, C, H, W) as pictures to look at, uint8 (N, 1 or 3, height, width), where they are none; then
            scores of pictures, and with them the fan-out, are refused.
        written: the samples as lines of text, where that is what they are.
        fit: makes the generator of images uint8 (N, C, H, W) and a seed at once, instead of steps; returns what it reports.
        differentiable: its losses heed `Batch.through`, which makes MAML exact; a loss with a stopped gradient cannot.
    """

    names: tuple[str, ...]
    networks: Callable[[TrainingConfig, Shape], dict[str, nn.Module]]
    phases: Callable[[TrainingConfig, AugmentConfig], list[Phase]]
    shown: Mapping[str, str]
    models: Mapping[str, Any] = field(default_factory=lambda: MODELS)
    translates: bool = False
    refuse: Callable[[TrainingConfig], None] = lambda config: None
    drawn: Callable[[TrainingConfig, Tensor], Tensor] | None = None
    written: Callable[[TrainingConfig, Tensor], list[str]] | None = None
    fit: Callable[[nn.Module, TrainingConfig, Tensor, int], dict[str, float]] | None = None
    differentiable: bool = True

    def pictures(self, config: TrainingConfig, samples: Tensor) -> Tensor:
        """Samples uint8 (N, C, H, W) as what can be looked at."""
        return self.drawn(config, samples) if self.drawn else samples

    def line(self, metrics: Mapping[str, float]) -> str:
        """The shown terms of a report."""
        return "  ".join(f"{label} {metrics[name]:.3f}" for label, name in self.shown.items() if name in metrics)
