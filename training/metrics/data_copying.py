"""C_T: a three-sample test of data-copying (Meehan, Chaudhuri and Dasgupta 2020, section 4)."""

import numpy as np
from scipy.stats import rankdata
from sklearn.cluster import KMeans
from torch import Tensor

from data_shards.errors import UserError
from training.metrics.checks import as_features, as_pair
from training.metrics.copying import nearest_support

CELLS = 10
PER_CELL = 20  # images of each of the three sets, on average, that a cell needs


def data_copying_statistic(fake: Tensor, training: Tensor, held_out: Tensor, *, seed: int,
                           cells: int | None = None) -> float:
    """Are generated images nearer to the training set than fresh real ones are, cell by cell?

    Features fall into k-means cells of the training set. In each cell Z_U, the standardised Mann-Whitney statistic,
    compares the distances to the nearest training image in it of the generated images with those of the held-out ones; C_T is
    the mean of the Z_U weighed by the held-out images in the cell (eq. 4), over the cells that hold all three kinds.

    Args:
        fake: (N, d).
        training: (T, d), the images that the generator was trained on.
        held_out: (H, d), real images of the same distribution that it was not trained on.
        seed: of k-means.
        cells: None takes one for every `PER_CELL` images of the smallest set, 1 to `CELLS`.

    Returns:
        A z-score: far below 0 (-5, say) where the generator copies, about 0 for fresh real images, far above 0 where it
        underfits. A generator can copy in some cells and underfit in others, and the mean be 0.

    Raises:
        UserError: malformed or non-finite features, fewer than 2 images, no cell with all three kinds.
    """
    fake, training = as_pair(fake, training, ("fake", "training"), at_least=2)
    held_out, _ = as_pair(held_out, training, ("held-out", "training"), at_least=2)
    count = cells or max(1, min(CELLS, min(len(fake), len(training), len(held_out)) // PER_CELL))
    fitted = KMeans(count, n_init=3, random_state=seed).fit(training.cpu().numpy())
    in_fake, in_training, in_held_out = (fitted.predict(as_features(part, "given").cpu().numpy())
                                         for part in (fake, training, held_out))
    scores, weights = [], []
    for cell in range(count):
        parts = fake[in_fake == cell], training[in_training == cell], held_out[in_held_out == cell]
        if all(map(len, parts)):
            near_fake, near_held_out = (nearest_support(part, parts[1])[1].cpu().numpy() for part in (parts[0], parts[2]))
            scores.append(_mann_whitney_z(near_fake, near_held_out))
            weights.append(len(near_held_out))
    if not scores:
        raise UserError(f"No cell of {count} holds generated, training and held-out images at once; give cells=1.")
    return float(np.average(scores, weights=weights))


def _mann_whitney_z(x: np.ndarray, y: np.ndarray) -> float:
    """Z of U = the number of pairs with x > y, ties a half (Mann and Whitney 1947); 0 in expectation for equal laws."""
    n, m = len(x), len(y)
    u = rankdata(np.concatenate([x, y]))[:n].sum() - n * (n + 1) / 2
    return float((u - n * m / 2) / np.sqrt(n * m * (n + m + 1) / 12))
