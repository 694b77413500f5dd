"""The baseline without any training by steps: a mixture of Gaussians on the principal components of the support images
(`training.families.density`), whatever family the source is of."""

from typing import Any

from training.methods.method import Method

FITTED: dict[str, Any] = {
    "training.engine": {}, "training.objective": {}, "training.augmentation": {}, "adaptation.augmentation": {}}
"""What is of the source's networks alone, and would be refused beside a family that is fitted at once, at its defaults."""

METHOD = Method(start="scratch", hyperparameters=(), settings={**FITTED, "training.family": "density"})
