"""The limit: a bare loop of pread and decoding into one array, with nothing checked, mixed, labelled or handed over.

With n workers, n such loops run at once, each over its share. `limit` decodes by Pillow as anyone would, `limit-frombytes`
by the call that graft uses for plain PNGs.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from benchmarks.peers.measure import Epoch, Job, main
from data_shards import open_set
from data_shards.images import decode_into


def open_loader(job: Job) -> Epoch:
    opened = open_set(job.source)
    offsets, sizes = (opened.samples[name].tolist() for name in ("offset", "size"))
    shards = opened.shards_of(np.arange(len(opened))).tolist()
    files = [os.open(opened.shard_path(number), os.O_RDONLY) for number in range(len(opened.manifest.shards))]
    order = np.random.default_rng(job.seed).permutation(job.count)
    images = np.empty((job.batch, *job.shape), np.uint8)
    target = images[:, 0] if job.shape[0] == 1 else images.transpose(0, 2, 3, 1)
    labels = torch.zeros(job.batch)

    def pillow(ids: list[int]) -> Iterator[None]:
        for begin in range(0, len(ids), job.batch):
            for place, index in enumerate(ids[begin : begin + job.batch]):
                data = os.pread(files[shards[index]], sizes[index], offsets[index])
                target[place] = np.asarray(Image.open(io.BytesIO(data), formats=("PNG",)))
            yield None

    def short(ids: list[int]) -> Iterator[None]:
        for begin in range(0, len(ids), job.batch):
            for place, index in enumerate(ids[begin : begin + job.batch]):
                decode_into(images[place], os.pread(files[shards[index]], sizes[index], offsets[index]))
            yield None

    loop = short if job.peer == "limit-frombytes" else pillow

    def epoch() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        shares = [order[number :: max(1, job.workers)].tolist() for number in range(max(1, job.workers))]
        children = []
        for share in shares[1:]:
            child = os.fork()
            if child == 0:
                for _ in loop(share):
                    pass
                os._exit(0)
            children.append(child)
        for _ in loop(shares[0]):
            yield torch.from_numpy(images), labels
        for child in children:
            os.waitpid(child, 0)
        for share in shares[1:]:
            for begin in range(0, len(share), job.batch):  # what the other loops decoded, to be counted
                yield torch.from_numpy(images[: len(share[begin : begin + job.batch])]), labels

    return epoch


if __name__ == "__main__":
    main(None, open_loader)
