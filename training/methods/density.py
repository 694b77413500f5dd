"""The baseline without any training by steps: a mixture of Gaussians on the principal components of the support images
(`training.families.density`), whatever family the source is of."""

from training.methods.method import Method

# What is of the source's networks alone, and would be refused beside this family, is left at its defaults.
METHOD = Method(start="scratch", hyperparameters=(), settings={
    "training.family": "density", "training.engine": {}, "training.objective": {}, "training.augmentation": {},
    "adaptation.augmentation": {}})
