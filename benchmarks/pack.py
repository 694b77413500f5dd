"""How fast images are packed: 24,000 drawings as PNG files, resized from 32 to 28 pixels, against a bare loop.

The bare loop opens, resizes and encodes each file and throws the result away; packing also checks, hashes, finds copies,
writes tars and their table, and syncs them. All variants run in turn, so that each meets the same noise; medians are
compared. Goals: packing within 1.5 times the bare loop, two processes at least 1.8 times as fast as one.

    python benchmarks/pack.py [--root data] [--images 24000] [--repeats 5]
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

from PIL import Image

from data_shards import fetch, load_images, pack_source

SIZE = 28
SET = "quickdraw/source"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of the fetched sets")
    parser.add_argument("--images", type=int, default=24_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="graft-bench-") as scratch:
        files = export(Path(options.root), options.images, Path(scratch) / "png")
        variants: dict[str, Callable[[], object]] = {
            "bare loop": lambda: bare(files),
            "bare loop, 2 processes": lambda: bare_over_two(files),
            "pack, 1 process": lambda: pack(Path(scratch), 1),
            "pack, 2 processes": lambda: pack(Path(scratch), 2),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
        for _ in range(options.repeats):
            for name, run in variants.items():
                times[name].append(timed(run))
        report(times, len(files))


def export(root: Path, count: int, folder: Path) -> list[str]:
    """Writes the first images of the source set as PNG files in folders by class; returns their paths."""
    drawings = fetch("quickdraw", root, only={SET}).sets[SET]
    files = []
    for start in range(0, min(count, len(drawings)), 2000):
        ids = range(start, min(start + 2000, count, len(drawings)))
        images, labels = load_images(drawings, ids)
        for number, image, label in zip(ids, images.numpy(), labels, strict=True):
            path = folder / f"{int(label):03d}" / f"{number:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0]).save(path)
            files.append(str(path))
    return files


def bare(files: list[str]) -> None:
    """What cannot be left out."""
    for file in files:
        with Image.open(file) as image:
            small = image.convert("L").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        small.save(io.BytesIO(), "PNG", compress_level=6)


def bare_over_two(files: list[str]) -> None:
    with get_context("fork").Pool(2) as pool:
        pool.map(bare, [files[0::2], files[1::2]], chunksize=1)


def pack(scratch: Path, processes: int) -> None:
    pack_source(scratch / "png", scratch / "set", SIZE, 1, processes=processes)
    shutil.rmtree(scratch / "set")


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """(seconds on the clock, seconds of all CPUs)."""
    clock, cpu = time.perf_counter(), cpu_seconds()
    run()
    return time.perf_counter() - clock, cpu_seconds() - cpu


def cpu_seconds() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in usage)


def report(times: dict[str, list[tuple[float, float]]], images: int) -> None:
    clock = {name: statistics.median(run[0] for run in runs) for name, runs in times.items()}
    cpu = {name: statistics.median(run[1] for run in runs) for name, runs in times.items()}
    print(f"{images} images, {len(os.sched_getaffinity(0))} CPUs, median of {len(times['bare loop'])} interleaved runs")
    for name in times:
        print(f"{name:24} {clock[name]:6.2f} s  {images / clock[name]:7.0f} images/s  {cpu[name]:6.2f} s of CPU")
    bare_1, bare_2, pack_1, pack_2 = times
    for title, ours, theirs in (("1 process", pack_1, bare_1), ("2 processes", pack_2, bare_2)):
        ratio, cpu_ratio = clock[ours] / clock[theirs], cpu[ours] / cpu[theirs]
        print(f"pack / bare loop, {title:12} {ratio:.2f} (CPU {cpu_ratio:.2f}), goal <= 1.5")
    print(f"pack, 1 / 2 processes          {clock[pack_1] / clock[pack_2]:.2f}, goal >= 1.8")
    print(f"bare loop, 1 / 2 processes     {clock[bare_1] / clock[bare_2]:.2f}, what the machine gave meanwhile")


if __name__ == "__main__":
    main()
