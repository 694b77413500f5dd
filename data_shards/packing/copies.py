"""Copies among the images of a set: exact ones by the hash of their bytes as encoded, near ones by a perceptual hash.

All images of a set are encoded alike, so equal bytes are equal pixels, whatever file the image came in.

The perceptual hash is dHash: the image in gray is shrunk to 9 x 8 pixels (Pillow's box filter), and each of the 64 bits
says whether a pixel is brighter than its left neighbour. Two images are near if few bits differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import numpy as np
from PIL import Image

from data_shards.packing.plan import NO_NEAR

MAX_PAIRS = 100_000  # listed
MAX_COMPARED = 500_000_000  # pairs that share enough bits to be looked at: some ten seconds
SMALL, BLOCK_ROWS = 32, 256  # rows of one key that are compared one by one, and in blocks


def thumbnail(image: Image.Image) -> bytes:
    """The 72 gray pixels (8 rows of 9) of which the hash of a picture of mode L or RGB is made."""
    gray = image if image.mode == "L" else image.convert("L")
    return gray.resize((9, 8), Image.Resampling.BOX).tobytes()


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
    keys, ranked = keys[order], values[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    sizes = np.diff(np.concatenate([starts, [len(keys)]]))
    found: list[tuple[np.ndarray, np.ndarray]] = []
    compared, count = 0, 0
    for left, right in _candidates(starts, sizes):
        apart = np.bitwise_count(ranked[left] ^ ranked[right])
        close = np.nonzero(apart <= distance)
        one, two = np.broadcast_arrays(left, right)
        upper = one[close] < two[close]
        found.append((np.stack([order[one[close]][upper], order[two[close]][upper]], 1), apart[close][upper]))
        compared, count = compared + apart.size, count + int(upper.sum())
        if compared >= limit or count > 10 * MAX_PAIRS:
            compared = limit
            break
    pairs, distances = zip(*found, strict=True) if found else ((np.empty((0, 2), np.int64),), (np.empty(0, np.uint8),))
    return np.concatenate(pairs), np.concatenate(distances), compared


def _candidates(starts: np.ndarray, sizes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of rows within each run of equal keys, as index arrays that broadcast: small runs all at once, by how far
    their rows are apart, large ones in blocks."""
    small = (sizes > 1) & (sizes <= SMALL)
    rows = np.repeat(starts[small] + sizes[small], sizes[small])  # the end of each row's run
    places = np.concatenate([[0], np.cumsum(sizes[small])[:-1]]) if small.any() else np.empty(0, np.int64)
    row = np.arange(len(rows)) - np.repeat(places, sizes[small]) + np.repeat(starts[small], sizes[small])
    for lag in range(1, SMALL):
        inside = row + lag < rows
        row, rows = row[inside], rows[inside]
        if not len(row):
            break
        yield row, row + lag
    for start, size in zip(starts[sizes > SMALL].tolist(), sizes[sizes > SMALL].tolist(), strict=True):
        for low in range(start, start + size, BLOCK_ROWS):
            high = min(low + BLOCK_ROWS, start + size)
            for first in range(low, start + size, 64 * BLOCK_ROWS):
                last = min(first + 64 * BLOCK_ROWS, start + size)
                yield np.arange(low, high)[:, None], np.arange(first, last)[None]
