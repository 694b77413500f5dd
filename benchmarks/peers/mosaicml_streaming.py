"""mosaicml-streaming: MDS with a column of bytes, its default shuffle (py1e)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset

from benchmarks.peers.measure import Epoch, Job, collate, decode, main, tensors


def write(samples: Iterator[tuple[bytes, int]], folder: str) -> None:
    with MDSWriter(out=folder, columns={"png": "bytes", "label": "int"}, size_limit=SHARD_BYTES) as writer:
        for data, label in samples:
            writer.write({"png": data, "label": label})


SHARD_BYTES = 1 << 26  # its default


class Images(StreamingDataset):
    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        sample: dict[str, Any] = super().__getitem__(index)
        return decode(sample["png"]), sample["label"]


def open_loader(job: Job) -> Epoch:
    where = {"remote": job.url, "local": job.folder + ".local"} if job.url else {"local": job.folder}
    dataset = Images(**where, shuffle=True, shuffle_seed=job.seed, batch_size=job.batch)
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
