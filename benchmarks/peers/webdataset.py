"""webdataset over graft's own tars: shards shuffled and split over workers, a buffer of 1,000 samples, batches in workers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import webdataset as wds

from benchmarks.peers.measure import Epoch, Job, collate, decode, main, tensors


def open_loader(job: Job) -> Epoch:
    names = sorted(path.name for path in Path(job.source).glob("*.tar"))
    if job.url:
        wds.gopen_schemes["s3"] = _open_s3
    root = job.url or job.source
    cache = f"{job.folder}.local" if job.url else None
    dataset = (
        wds.WebDataset([f"{root}/{name}" for name in names], shardshuffle=100, seed=job.seed, cache_dir=cache)
        .shuffle(1000)
        .to_tuple("png", "cls")
        .map_tuple(decode, int)
        .batched(job.batch, collation_fn=collate)
    )
    persistent = job.workers > 0
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=job.workers, persistent_workers=persistent, collate_fn=_same)
    return lambda: tensors(loader)


def _open_s3(url: str, *args: Any, **options: Any) -> Any:
    import boto3

    bucket, _, key = url.removeprefix("s3://").partition("/")
    return boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).get_object(Bucket=bucket, Key=key)["Body"]


def _same(batch: Any) -> Any:
    return batch


if __name__ == "__main__":
    main(None, open_loader)
