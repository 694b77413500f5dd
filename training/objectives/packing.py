"""Packing (Lin et al. 2018, PacGAN): D judges m samples of one kind together, so that a lack of variety can be seen."""

from __future__ import annotations

from torch import Tensor

from data_shards.errors import UserError


def pack(images: Tensor, m: int) -> Tensor:
    """(N, C, ...) -> (N / m, m C, ...): m samples stacked along the channels.

    Sample j goes with j + N/m, j + 2N/m, ...: as rank r of W holds the samples r, r + W, ... of the global batch, the packs
    are then the same at every world size.
    """
    n, channels = images.shape[:2]
    return images.unflatten(0, (m, n // m)).transpose(0, 1).reshape(n // m, m * channels, *images.shape[2:])


def check_packing(key: str, batch: int, parts: int, m: int) -> None:
    """Refuse a global ``batch``, the recipe's ``key``, each of whose ``parts`` (ranks x micro-batches) is not of whole packs.

    Raises:
        UserError: with the nearest batch sizes that do.
    """
    step = m * parts
    if batch % step:
        near = " or ".join(str(size) for size in (batch - batch % step, batch - batch % step + step) if size)
        packs = f"packs of {m} (training.objective.pack) in each of its " if m > 1 else ""
        raise UserError(f"{key} = {batch} does not fall into {packs}{parts} equal parts "
                        f"(workers x training.engine.accumulation); use {near}.")
