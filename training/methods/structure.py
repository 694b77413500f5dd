"""Structure transfer: new weights, trained as the source was.

The architecture is the recipe's for every method, the control included, so this is training from scratch by other settings and
nothing else: each network's optimizer, learning rate and its schedule, the weights of R1 and R2 and the augmentation are those
of the recipe's ``training`` section, which were found on the source, in the place of ``adaptation``'s. Whatever they count in
images is shortened as the trial is shorter than the pretraining. Batch, budget and the half-life of the average stay those of
all trials. Nothing is searched on the target: the method has one candidate, which is the point of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from training.methods.method import Method
from training.optimizers import OptimizerConfig
from training.schedule import Schedule

if TYPE_CHECKING:
    from training.recipe import TrainingRecipe


def stretched(schedule: Schedule, factor: float) -> Any:
    """The schedule with every knot at ``factor`` times its images, JSON-ready."""
    return [[images * factor, value] for images, value in schedule] if isinstance(schedule, list) else schedule


def settings_of_the_source(recipe: TrainingRecipe) -> Mapping[str, Any]:
    """Values of the recipe's ``adaptation`` section, as the pretraining has them."""
    training = recipe.training
    factor = recipe.adaptation.images / training.images
    optimizers = {name: {**config.model_dump(mode="json", include=set(OptimizerConfig.model_fields)),
                         "lr": stretched(config.lr, factor)} for name, config in training.optimizers().items()}
    seen = training.augmentation
    augmentation = {**seen.model_dump(mode="json"), "p": seen.p if isinstance(seen.p, str) else stretched(seen.p, factor),
                    "speed_images": seen.speed_images * factor}
    return {"adaptation.optimizers": optimizers, "adaptation.augmentation": augmentation,
            **{f"adaptation.{name}": stretched(getattr(training.objective, name), factor) for name in ("r1", "r2")}}


METHOD = Method(start="scratch", derived=settings_of_the_source, hyperparameters=())
