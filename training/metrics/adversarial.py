"""Adversarial score: can a fresh discriminator tell generated from held-out real images? (Lopez-Paz and Oquab 2017, C2ST)."""

import numpy as np
from sklearn.decomposition import PCA
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import Tensor

from data_shards.errors import UserError
from training.metrics.checks import as_pair

FOLDS = 5
MOST = 4000  # images of each kind: the machine's cost goes with the square
DIMENSIONS = 64


def adversarial_accuracy(fake: Tensor, real: Tensor, *, seed: int, folds: int = FOLDS) -> float:
    """Balanced accuracy of a support vector machine with a Gaussian kernel that was trained on the other folds.

    Each image is judged by a machine that has not seen it (cross-fitting), trained on the contract's features,
    standardised and reduced to their leading `DIMENSIONS` principal components within the fold. The classes are weighed
    alike, so unlike counts do not move the score. The real images must be none that the generator was trained on.

    Args:
        fake: (N, d), N >= `folds`; of more than `MOST` images a random `MOST` count.
        real: (M, d) likewise.
        seed: of the subsets and the folds.
        folds: >= 2.

    Returns:
        In [0, 1]: 0.5 where the sets cannot be told apart, 1 where they always can; chance spreads it around 0.5 by
        about 1 / sqrt(N + M).

    Raises:
        UserError: malformed or non-finite features, fewer images than folds.
    """
    if folds < 2:
        raise UserError(f"folds={folds} leave nothing to train on; give 2 or more, usually {FOLDS}.")
    fake, real = as_pair(fake, real, ("fake", "real"), at_least=folds)
    rng = np.random.default_rng(seed)
    x, y = (part.cpu().numpy()[np.sort(rng.permutation(len(part))[:MOST])] for part in (fake, real))
    features, kind = np.concatenate([x, y]), np.repeat([1, 0], [len(x), len(y)])
    smallest_training = len(features) - -(-len(features) // folds)
    dimensions = min(DIMENSIONS, features.shape[1], smallest_training)
    machine = make_pipeline(StandardScaler(), PCA(dimensions, svd_solver="full"), SVC(class_weight="balanced"))
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    return float(balanced_accuracy_score(kind, cross_val_predict(machine, features, kind, cv=split)))
