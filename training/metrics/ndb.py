"""NDB: the number of statistically different bins (Richardson and Weiss 2018, "On GANs and GMMs", section 2)."""

import numpy as np
from scipy.spatial.distance import jensenshannon
from scipy.stats import norm
from sklearn.cluster import KMeans
from torch import Tensor

from data_shards.errors import UserError
from training.metrics.checks import as_pair

BINS = 100
PER_BIN = 20  # reference images, on average, that a bin needs


def ndb(fake: Tensor, real: Tensor, *, seed: int, bins: int | None = None, alpha: float = 0.05) -> dict[str, float | int]:
    """Share of k-means bins in which the sets' proportions differ by a two-proportion z-test, and their divergence.

    The bins are fitted to the reference and counted over it, as in the paper. That its own images lie nearer to the
    centres moves little: two samples of 2,000 of one normal distribution differed in 3 to 4 % of 100 bins in 2, 16 and 64
    dimensions (6 pairs each) where the test's level is 5 %.

    Args:
        fake: (N, d).
        real: (M, d), M >= 2 * `PER_BIN`.
        seed: of k-means.
        bins: K >= 2; None takes 100, fewer where the reference has under `PER_BIN` images for each.
        alpha: level of each bin's test; a perfect sampler scores this share.

    Returns:
        ndb_share in [0, 1]: NDB/K; ndb_js in [0, ln 2]: Jensen-Shannon divergence of the two histograms, in nats;
        ndb_bins: K.

    Raises:
        UserError: malformed or non-finite features, too few images, arguments out of range.
    """
    fake, real = as_pair(fake, real, ("fake", "real"), at_least=2)
    bins = bins or min(BINS, len(real) // PER_BIN)
    if bins < 2 or len(real) < bins or not 0 < alpha < 1:
        raise UserError(f"{len(real)} reference images cannot be counted in {bins} bins at level {alpha}; give at least "
                        f"{2 * PER_BIN} images.")
    x, y = fake.cpu().numpy(), real.cpu().numpy()
    fitted = KMeans(bins, n_init=3, random_state=seed).fit(y)
    counts = [np.bincount(fitted.predict(part), minlength=bins) for part in (x, y)]
    p, q = (count / count.sum() for count in counts)
    n, m = (count.sum() for count in counts)
    pooled = (counts[0] + counts[1]) / (n + m)  # the test's standard error under equal proportions
    error = np.sqrt(pooled * (1 - pooled) * (1 / n + 1 / m))
    z = np.abs(p - q) / np.where(error > 0, error, 1)  # 0 in a bin that is empty in both
    return {"ndb_share": float((z > norm.isf(alpha / 2)).mean()), "ndb_js": float(jensenshannon(p, q) ** 2), "ndb_bins": bins}
