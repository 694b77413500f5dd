"""The support set itself, emitted image by image (`training.families.copier`): what the copy gate must disqualify, and the KID
that memorising the support set is worth."""

from training.methods.density import FITTED
from training.methods.method import Method

METHOD = Method(start="scratch", hyperparameters=(), judged=False, settings={**FITTED, "training.family": "copier"},
                derived=lambda recipe: {"training.copier.images": recipe.adaptation.shots})
