"""graft: batches without end in the order of `data_shards.order`."""

from __future__ import annotations

from itertools import islice

from benchmarks.peers.measure import Epoch, Job, main
from data_shards import batches, open_set
from data_shards.reader import CACHE_BYTES


def open_loader(job: Job) -> Epoch:
    found = batches(
        open_set(job.url or job.source),
        batch=job.batch,
        seed=job.seed,
        workers=job.workers,
        cache_bytes=CACHE_BYTES if job.cache else 0,
    )
    return lambda: ((one.images, one.labels) for one in islice(found, job.count // job.batch))


if __name__ == "__main__":
    main(None, open_loader)
