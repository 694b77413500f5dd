"""Two million images in two thousand shards on an S3 server process: packed, and read once by two ranks.

Each rank has a cache of its own, as on two machines. Checked: every sample once, bytes fetched by each rank at most 1.3 x
half the set, memory flat. Run it by `make scale`; it takes about a quarter of an hour and 8 GB of memory (the server's).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.peers.s3 import BUCKET, s3_server

SIZE = 32
BATCH = 1000
CACHE_BYTES = 1_000_000_000  # of each rank; less than its half of the set, so that chunks are evicted
_ROWS, _COLUMNS = np.mgrid[:SIZE, :SIZE].astype(np.uint32)


def make(number: int) -> tuple[np.ndarray, int]:
    """An image that no other number has: a pattern by its bits, uint8 (1, 32, 32), and one of ten labels."""
    image = (_ROWS * (number % 97 + 3) + _COLUMNS * (number // 97 % 89 + 5) + (_ROWS * _COLUMNS * (number % 13) >> 3)) >> 1
    image[:4, :8] = (number >> np.arange(32, dtype=np.uint32).reshape(4, 8) & 1) * 255
    return (image & 255).astype(np.uint8)[None], number % 10


def number_of(image_HW: np.ndarray) -> int:
    """The number whose image it is."""
    return int((image_HW[:4, :8].reshape(-1) > 127).astype(np.uint64) @ (1 << np.arange(32, dtype=np.uint64)))


def read_pass(place: str, images: int, rank: int, world: int, cache: str, answers: Any) -> None:
    """One rank's pass: which samples it saw, how fast, its memory over time, and what it fetched."""
    os.environ.update(GRAFT_CACHE=cache, GRAFT_CACHE_BYTES=str(CACHE_BYTES))
    from data_shards import batches, open_set
    from data_shards.stores.objects import ObjectStore

    fetched, original = [0, 0], ObjectStore._read

    def counting(store: ObjectStore, name: str, start: int, end: int | None, cap: int) -> bytes:
        data = original(store, name, start, end, cap)
        fetched[0] += len(data)
        fetched[1] += 1
        return data

    ObjectStore._read = counting  # type: ignore[method-assign,assignment]
    seen, process = np.zeros(images, np.uint8), psutil.Process()
    memory: list[float] = []
    begin = time.monotonic()
    feed = batches(open_set(place), batch=BATCH, seed=0, rank=rank, world=world, cache_bytes=0)
    first = 0.0
    for step in range(images // BATCH):
        batch = next(feed)
        first = first or time.monotonic() - begin
        numbers = np.array([int(name) for name in batch.names.tolist()])
        seen[numbers] += 1
        assert number_of(batch.images[0, 0].numpy()) == numbers[0], "the image is the key's"
        if step % max(1, images // BATCH // 20) == 0:
            memory.append(process.memory_info().rss / 1e6)
    seconds = time.monotonic() - begin
    answers.put({"rank": rank, "seen": seen.tobytes(), "seconds": seconds, "first_batch_s": first, "memory_MB": memory,
                 "fetched": fetched[0], "requests": fetched[1]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2_000_000)
    parser.add_argument("--shard-samples", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    assert options.images % BATCH == 0
    folder = Path(tempfile.mkdtemp(prefix="graft-scale-"))
    os.environ["GRAFT_CACHE"] = str(folder / "packing")
    try:
        with s3_server():
            figures = run(options.images, options.shard_samples, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(figures, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def run(images: int, shard_samples: int, folder: Path) -> dict[str, Any]:
    """Packs and reads; returns the figures. Raises `AssertionError` where a promise is broken."""
    import boto3

    from data_shards import pack_arrays

    boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).create_bucket(Bucket=BUCKET)
    place, begin = f"s3://{BUCKET}/scale", time.monotonic()
    shown = [0]

    def progress(done: int, total: int, written: int) -> None:
        if done >= shown[0]:
            shown[0] += max(1, total // 20)
            print(f"packed {done} of {total}, {written / 1e6:.0f} MB, {time.monotonic() - begin:.0f} s", flush=True)

    made = pack_arrays(make, images, place, name="scale", shape=(1, SIZE, SIZE), identity="scale 1",
                       classes=[str(digit) for digit in range(10)], shard_samples=shard_samples, processes=2,
                       progress=progress)
    packing = time.monotonic() - begin
    size = sum(shard.size for shard in made.manifest.shards)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [context.Process(target=read_pass, args=(place, images, rank, 2, str(folder / f"cache-{rank}"), answers))
             for rank in range(2)]
    for process in ranks:
        process.start()
    found = sorted((answers.get() for _ in ranks), key=lambda answer: answer["rank"])
    for process in ranks:
        process.join()
    seen = np.sum([np.frombuffer(answer.pop("seen"), np.uint8) for answer in found], axis=0, dtype=np.int64)
    assert (seen == 1).all(), f"{(seen == 0).sum()} samples were not read, {(seen > 1).sum()} more than once"
    for answer in found:
        answer["of_half_the_set"] = round(answer["fetched"] / (size / 2), 3)
        answer["images_per_s"] = round(images / 2 / answer["seconds"])
        answer["memory_MB"] = [round(value) for value in answer["memory_MB"]]
        # Each of the 24 streams begins and ends within a shard: of few shards a rank fetches more than its half.
        assert answer["of_half_the_set"] <= 1.3 or len(made.manifest.shards) < 500, answer
        late = answer["memory_MB"][len(answer["memory_MB"]) // 4:]
        assert max(late) - min(late) < 0.1 * max(late), f"memory is not flat: {answer['memory_MB']}"
    return {"images": images, "shards": len(made.manifest.shards), "MB": round(size / 1e6), "pack_s": round(packing),
            "pack_images_per_s": round(images / packing), "every_sample_once": True, "ranks": found}


if __name__ == "__main__":
    main()
