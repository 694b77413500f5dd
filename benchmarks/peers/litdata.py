"""litdata: samples of bytes and a label, its shuffle, chunks read where they lie."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from litdata import StreamingDataLoader, StreamingDataset, optimize
from litdata.streaming import downloader

from benchmarks.peers.measure import Epoch, Job, collate, decode, main, tensors


def write(samples: Iterator[tuple[bytes, int]], folder: str) -> None:
    listed = list(samples)
    optimize(
        fn=partial(_sample, listed),
        inputs=list(range(len(listed))),
        output_dir=folder,
        chunk_bytes="64MB",  # what its documentation uses
        num_workers=1,
    )


def _sample(listed: list[tuple[bytes, int]], index: int) -> dict[str, Any]:
    return {"png": listed[index][0], "label": listed[index][1]}


def _decoded(sample: dict[str, Any]) -> tuple[np.ndarray, int]:
    return decode(sample["png"]), sample["label"]


def open_loader(job: Job) -> Epoch:
    options = {"cache_dir": job.folder + ".local"} if job.url else {}
    if job.url:  # its faster client refuses a server without TLS, and has no option for it
        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
    dataset = StreamingDataset(job.url or job.folder, shuffle=True, seed=job.seed, transform=_decoded, **options)
    loader = StreamingDataLoader(
        dataset,
        batch_size=job.batch,
        num_workers=job.workers,
        collate_fn=collate,
        persistent_workers=job.workers > 0,
    )
    return lambda: tensors(loader)


if __name__ == "__main__":
    main(write, open_loader)
