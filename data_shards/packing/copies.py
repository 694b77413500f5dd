"""Copies among the images of a set: exact ones by the hash of their pixels, near ones by a perceptual hash.

The perceptual hash is dHash: the image in gray is shrunk to 9 x 8 pixels (Pillow's box filter), and each of the 64 bits
says whether a pixel is brighter than its left neighbour. Two images are near if few bits differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

import numpy as np
from PIL import Image

from data_shards.packing.plan import NO_NEAR

MAX_PAIRS = 100_000  # listed
MAX_COMPARED = 200_000_000  # pairs that share enough bits to be looked at


def thumbnail(image: Image.Image) -> bytes:
    """The 72 gray pixels (8 rows of 9) of which the hash of a picture of mode L or RGB is made."""
    return image.convert("L").resize((9, 8), Image.Resampling.BOX).tobytes()


def hashes64(thumbnails: Sequence[bytes], count: int) -> np.ndarray:
    """uint64 (count,): the dHash of each thumbnail; zeros where none were made."""
    if len(thumbnails) != count or not count:
        return np.zeros(count, np.uint64)
    pixels = np.frombuffer(b"".join(thumbnails), np.uint8).reshape(count, 8, 9)
    bits = pixels[:, :, 1:] > pixels[:, :, :-1]
    return np.packbits(bits.reshape(count, 64), axis=1).view(">u8")[:, 0].astype(np.uint64)


def exact_copies(hashes: np.ndarray, splits: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """int64 (N,): for each sample the row of the one that is kept for it, its own where it is no copy.

    Of equal samples the one in the split "reference" (1) is kept, else the one that comes first in its source; so no image
    is left in "train" (0) that is in "reference" too. `hashes` is uint64 (N, 2).
    """
    order = np.lexsort((indices, splits == 0, hashes[:, 1], hashes[:, 0]))
    ranked = hashes[order]
    first = np.ones(len(order), bool)
    first[1:] = (ranked[1:] != ranked[:-1]).any(1)
    kept = np.empty(len(order), np.int64)
    kept[order] = order[np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))]
    return kept


def near_pairs(hashes: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """Pairs of rows whose 64-bit hashes (uint64 (N,)) differ in at most `distance` bits, closest first.

    Returns (int64 (P, 2), uint8 (P,) distances, whether the list was capped). Rows of one and the same hash are each
    paired with the first of them, which then stands for them all.

    Among `distance` + 2 bands of bits, two hashes so close agree in at least two; so only those that share a pair of bands
    are compared, and not all with all.
    """
    if distance == NO_NEAR or not len(hashes):
        return np.empty((0, 2), np.int64), np.empty(0, np.uint8), False
    values, first, where = np.unique(hashes, return_index=True, return_inverse=True)
    copies = np.flatnonzero(first[where] != np.arange(len(hashes)))
    pairs = [np.stack([first[where[copies]], copies], 1)]
    distances = [np.zeros(len(copies), np.uint8)]
    left = MAX_COMPARED
    edges = np.linspace(0, 64, distance + 3).round().astype(int)
    masks = [np.uint64(((1 << int(high)) - 1) ^ ((1 << int(low)) - 1)) for low, high in pairwise(edges)]
    for one, two in combinations(masks, 2):
        if distance and left > 0:
            found, apart, compared = _within(values, values & (one | two), distance, left)
            left -= compared
            pairs.append(np.sort(first[found], 1))
            distances.append(apart)
    both, index = np.unique(np.concatenate(pairs), axis=0, return_index=True)
    apart = np.concatenate(distances)[index]
    order = np.lexsort((both[:, 1], both[:, 0], apart))[:MAX_PAIRS]
    return both[order], apart[order], left <= 0 or len(both) > MAX_PAIRS


def _within(values: np.ndarray, keys: np.ndarray, distance: int, limit: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Pairs of rows of one key that are close, their distances, and how many were compared (at most about `limit`)."""
    order = np.argsort(keys, kind="stable")
    keys, compared = keys[order], 0
    pairs, distances = [np.empty((0, 2), np.int64)], [np.empty(0, np.uint8)]
    rows = np.arange(len(keys))
    lag = 1
    while compared < limit:
        rows = rows[rows + lag < len(keys)]
        rows = rows[keys[rows] == keys[rows + lag]]
        if not len(rows):
            break
        compared += len(rows)
        left, right = order[rows], order[rows + lag]
        apart = np.bitwise_count(values[left] ^ values[right])
        close = apart <= distance
        pairs.append(np.stack([left[close], right[close]], 1))
        distances.append(apart[close])
        if sum(map(len, distances)) > 10 * MAX_PAIRS:
            return np.concatenate(pairs), np.concatenate(distances), limit
        lag += 1
    return np.concatenate(pairs), np.concatenate(distances), compared
