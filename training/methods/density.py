"""The baseline without any training by steps: a mixture of Gaussians on the principal components of the support images
(`training.families.density`), whatever family the source is of."""

from training.methods.method import Method

METHOD = Method(start="scratch", settings={"training.family": "density", "training.engine": {}}, hyperparameters=())
