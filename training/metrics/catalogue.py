"""Every score of a set of generated images by name. A new one is a file and a line in SCORES."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_shards.errors import UserError
from training.metrics.adversarial import adversarial_accuracy
from training.metrics.birthday import birthday_support
from training.metrics.classification import Labelled, classification_scores, small_classifier
from training.metrics.collapse import collapse_signs
from training.metrics.copying import auth_pct, copy_rate, is_copier
from training.metrics.data_copying import data_copying_statistic
from training.metrics.fd_infinity import POINTS, fd_infinity
from training.metrics.features import FeatureNet
from training.metrics.frechet import Moments, frechet_from_moments, moments
from training.metrics.inception_score import inception_score
from training.metrics.intra_distance import intra_cluster_distance
from training.metrics.kid import kid, kid_interval
from training.metrics.likeness import Pictures
from training.metrics.mind import mind
from training.metrics.modes import label_modes
from training.metrics.ndb import PER_BIN, ndb
from training.metrics.path_length import path_length
from training.metrics.prdc import precision_recall_density_coverage
from training.metrics.score import FID_NET

READABLE = 0.5  # share of the reference's labels that a net must get right before it may label fakes


class Images(NamedTuple):
    """Images, their features in the material's net, and their classes, -1 where there is none."""

    images: Tensor  # uint8 (N, C, H, W)
    features: Tensor  # (N, d)
    labels: Tensor  # int64 (N,)

    @property
    def labelled(self) -> bool:
        return len(self.labels) > 0 and bool((self.labels >= 0).all())


@dataclass(frozen=True)
class Material:
    """What scores are computed of; None is not there."""

    net: FeatureNet
    seed: int
    fake: Images
    reference: Images  # the scores' yardstick
    reference_moments: Moments  # of the whole reference, which may be more images than `reference`
    classes: tuple[str, ...] = ()
    training: Images | None = None  # what the generator was trained on
    held_out: Images | None = None  # real images that it was not trained on
    generate: Callable[[Tensor], Tensor] | None = None  # latents -> float images, about [-1, 1]
    latent_dim: int = 0
    threads: int = 1


class Score(NamedTuple):
    """How a score is computed, and why it cannot be (None where it can)."""

    compute: Callable[[Material], Mapping[str, Any]]
    missing: Callable[[Material], str | None] = lambda _: None


def compute_scores(material: Material, names: Sequence[str] = (), *,
                   progress: Callable[[int, str], None] | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of the named scores, or of all that the material allows, and of those left out the reason.

    Args:
        material: images and features.
        names: keys of `SCORES`; empty for all.
        progress: called with the number of scores done and the name of the next.

    Raises:
        UserError: an unknown name, one whose material is missing, or features that a score refuses.
    """
    check_names(names)
    values: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for done, name in enumerate(names or SCORES):
        reason = SCORES[name].missing(material)
        if reason and names:
            raise UserError(f"The score {name!r} cannot be computed: {reason}.")
        if progress:
            progress(done, name)
        if reason:
            skipped[name] = reason
        else:
            values |= SCORES[name].compute(material)
    return values, skipped


def check_names(names: Sequence[str]) -> None:
    """Raises `UserError` for a name that is no key of `SCORES`."""
    for name in names:
        if name not in SCORES:
            raise UserError(f"There is no score {name!r}; choose among {', '.join(SCORES)}.")


def _kid(m: Material) -> dict[str, Any]:
    return {"kid": kid(m.fake.features, m.reference.features),
            "kid_ci95": list(kid_interval(m.fake.features, m.reference.features, seed=m.seed))}


def _fd(m: Material) -> dict[str, Any]:
    ours = moments(m.fake.features)
    fd = frechet_from_moments(ours.mean, ours.cov, m.reference_moments.mean, m.reference_moments.cov)
    return {"fd": fd, "fid": fd if m.net.name == FID_NET else None}


def _fd_infinity(m: Material) -> dict[str, Any]:
    return {"fd_infinity": fd_infinity(m.fake.features, m.reference_moments, seed=m.seed)}


def _inception_score(m: Material) -> dict[str, Any]:
    mean, _ = inception_score(_probabilities(m, m.fake.features))
    return {"inception_score": mean, "inception_score_reference": inception_score(_probabilities(m, m.reference.features))[0]}


def _intra(m: Material) -> dict[str, Any]:
    assert m.training
    return intra_cluster_distance(m.fake.features, m.training.features)


def _classification(m: Material) -> dict[str, Any]:
    assert m.training
    fake, training, reference = (Labelled(part.images, part.labels) for part in (m.fake, m.training, m.reference))
    return classification_scores(fake, training, reference, small_classifier(len(m.classes), seed=m.seed, threads=m.threads))


def _adversarial(m: Material) -> dict[str, Any]:
    assert m.held_out
    return {"adversarial_accuracy": adversarial_accuracy(m.fake.features, m.held_out.features, seed=m.seed)}


def _copying(m: Material) -> dict[str, Any]:
    assert m.training and m.held_out
    pictures = Pictures(m.fake.images, m.training.images, m.held_out.images)
    rate = copy_rate(m.fake.features, m.training.features, m.held_out.features, pictures=pictures)
    disqualified, reason = is_copier(rate, len(m.fake.features))
    return {"copy_rate": rate, "auth_pct": auth_pct(m.fake.features, m.training.features), "disqualified": disqualified,
            "reason": reason}


def _c_t(m: Material) -> dict[str, Any]:
    assert m.training and m.held_out
    return {"c_t": data_copying_statistic(m.fake.features, m.training.features, m.held_out.features, seed=m.seed)}


def _path_length(m: Material) -> dict[str, Any]:
    assert m.generate
    return {"path_length": path_length(m.generate, m.net, m.latent_dim, seed=m.seed)}


def _modes(m: Material) -> dict[str, Any]:
    mix = torch.bincount(m.reference.labels, minlength=len(m.classes))
    return label_modes(_probabilities(m, m.fake.features).argmax(dim=1).cpu(), mix) | {"modes_readable": _readable(m)}


def _probabilities(m: Material, features: Tensor) -> Tensor:
    assert m.net.classify
    weights = next(m.net.module.parameters())
    with torch.inference_mode():
        return torch.cat([m.net.classify(part.to(weights.device)) for part in features.split(4096)]).double()


def _readable(m: Material) -> float:
    return float((_probabilities(m, m.reference.features).argmax(dim=1).cpu() == m.reference.labels).double().mean())


def _no_classifier(m: Material) -> str | None:
    return None if m.net.classify else f"the net {m.net.name} has no classifier"


def _no_training(m: Material) -> str | None:
    if m.training is None or len(m.training.features) < 2:
        return "there are no two images that the generator was trained on"
    return None


def _no_clusters(m: Material) -> str | None:
    few = m.training is not None and len(m.fake.features) <= len(m.training.features)
    return _no_training(m) or ("it needs more generated images than training images" if few else None)


def _no_held_out(m: Material) -> str | None:
    if m.held_out is None or len(m.held_out.features) < 8:
        return "the set has no reference split of 8 images that the generator was not trained on; pack it with --reference"
    return None


def _no_three_samples(m: Material) -> str | None:
    return _no_training(m) or _no_held_out(m)


def _no_classes(m: Material) -> str | None:
    if len(m.classes) < 2 or not m.reference.labelled:
        return "the reference images have no classes"
    if not m.fake.labelled:
        return "the generated images have no classes of the reference (subfolders of its class names)"
    if m.training is None or not m.training.labelled:
        return "there are no training images with classes"
    size = m.reference.images.shape[2:]
    return None if size[0] == size[1] and 16 <= size[0] <= 128 else "its classifier takes square images of 16 to 128 px"


def _no_modes(m: Material) -> str | None:
    if len(m.classes) < 2 or not m.reference.labelled or len(m.reference.labels.unique()) < len(m.classes):
        return "the reference images do not have all of their set's classes"
    if reason := _no_classifier(m):
        return reason
    if _probabilities(m, m.reference.features[:1]).shape[1] != len(m.classes):
        return f"the net {m.net.name} knows other classes than the reference"
    share = _readable(m)
    return None if share >= READABLE else f"the net {m.net.name} reads only {share:.0%} of the reference's classes"


def _too_few(m: Material) -> str | None:
    return None if len(m.fake.features) >= 2 * POINTS else f"it needs {2 * POINTS} generated images"


SCORES: dict[str, Score] = {
    "kid": Score(_kid),
    "fd": Score(_fd),
    "fd_infinity": Score(_fd_infinity, _too_few),
    "prdc": Score(lambda m: precision_recall_density_coverage(m.fake.features, m.reference.features)),
    "mind": Score(lambda m: {"mind": mind(m.fake.features, m.reference.features, seed=m.seed)}),
    "inception_score": Score(_inception_score, _no_classifier),
    "intra_distance": Score(_intra, _no_clusters),
    "classification": Score(_classification, _no_classes),
    "adversarial": Score(_adversarial, _no_held_out),
    "copying": Score(_copying, _no_three_samples),
    "c_t": Score(_c_t, _no_three_samples),
    "path_length": Score(_path_length, lambda m: None if m.generate else "only a checkpoint has a map from latents"),
    "modes": Score(_modes, _no_modes),
    "ndb": Score(lambda m: ndb(m.fake.features, m.reference.features, seed=m.seed),
                 lambda m: None if len(m.reference.features) >= 2 * PER_BIN else f"it needs {2 * PER_BIN} reference images"),
    "birthday": Score(lambda m: birthday_support(m.fake.features, m.reference.features)),
    "collapse": Score(lambda m: collapse_signs(m.fake.features, m.reference.features)),
}
