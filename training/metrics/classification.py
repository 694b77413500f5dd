"""Train on generated, test on real, and the reverse: what a classifier thinks of labelled generated images.

Classification accuracy score (Ravuri and Vinyals 2019), also GAN-train and GAN-test (Shmelkov et al. 2018).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from sklearn.metrics import f1_score
from torch import Tensor

from data_shards.errors import UserError
from training.metrics.encoder import to_unit, train_encoder

IMAGES_BUDGET = 20_000  # that a classifier sees, repeats counted

Predict = Callable[[Tensor], Tensor]
Fit = Callable[[Tensor, Tensor], Predict]


class Labelled(NamedTuple):
    """Images uint8 (N, C, S, S) and their classes int64 (N,) in [0, classes)."""

    images: Tensor
    labels: Tensor


def classification_scores(fake: Labelled, training: Labelled, reference: Labelled, fit: Fit) -> dict[str, float]:
    """Accuracy and macro F1 of a classifier, one trained on the fakes, one on the real training images.

    A gap between cas and real is what the fakes lack (diversity above all: a generator with one good image a class has a
    high gan_test and a low cas); a gan_test far below real is what they get wrong.

    Args:
        fake: generated images with the classes they were asked for.
        training: real images of the same classes.
        reference: other real images, on which the first and the third pair are measured.
        fit: trains a fresh classifier, (images, labels) -> (images -> labels), such as `small_classifier`.

    Returns:
        cas_accuracy, cas_f1: trained on the fakes, tested on the reference; gan_test_accuracy, gan_test_f1: trained on the
        training images, tested on the fakes; real_accuracy, real_f1: the same classifier, tested on the reference. All in
        [0, 1]. F1 is the plain mean over the classes that occur in the truth.

    Raises:
        UserError: a set without images, or images without a label.
    """
    for name, part in (("generated", fake), ("training", training), ("reference", reference)):
        if len(part.images) == 0 or len(part.images) != len(part.labels) or int(part.labels.min()) < 0:
            raise UserError(f"The {name} images need a class each for a classification score; give labelled ones.")
    of_fakes, of_reals = fit(*fake), fit(*training)
    return {**_scores("cas", of_fakes, reference), **_scores("gan_test", of_reals, fake),
            **_scores("real", of_reals, reference)}


def small_classifier(classes: int, *, seed: int, images_budget: int = IMAGES_BUDGET, threads: int = 1) -> Fit:
    """A maker of fresh convolutional classifiers, of the shape of the in-domain encoder, for images of 16 to 128 px."""

    def fit(images: Tensor, labels: Tensor) -> Predict:
        net = train_encoder(images, labels, classes=classes, seed=seed, images_budget=images_budget, threads=threads)

        def predict(images: Tensor) -> Tensor:
            with torch.inference_mode():
                return torch.cat([net.logits(to_unit(part)).argmax(dim=1) for part in images.split(512)])

        return predict

    return fit


def _scores(name: str, predict: Predict, truth: Labelled) -> dict[str, float]:
    found, labels = predict(truth.images), truth.labels
    f1 = f1_score(labels.numpy(), found.numpy(), labels=labels.unique().numpy(), average="macro", zero_division=0)
    return {f"{name}_accuracy": float((found == labels).double().mean()), f"{name}_f1": float(f1)}
