"""Time and memory of opening a set of 10,000,000 samples in 10,000 shards and planning its first batch:
`python -m benchmarks.plan`.

The set is a manifest, its columns, and sparse files in the shards' sizes: nothing is decoded. Three processes are looked
at, each from its start to its end:

- `plan` imports data_shards.manifest and data_shards.order only (no torch, no webdataset): `open_set`, `make_order` and the
  sample ids of the first batch of rank 0 of 8;
- `batches` imports the reader, and torch with it: `open_set` and the call `batches(...)`, from which no batch is taken;
- `columns` does what `plan` does and then looks up the first batch in the five columns that reading needs, each of which is
  hashed whole at its first use. It is shown, not judged.

Time is counted from before `open_set` to the end, in a warm page cache, without imports. Memory is the process's largest
resident set (VmHWM), all imports and mapped files included, and beside it what the imports alone took.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np

from data_shards.manifest import COLUMNS, MANIFEST, Manifest, Shard, open_set, write_set
from data_shards.order import make_order, sample_indices

ROOT = Path(__file__).parents[1]
SHARDS, SAMPLES, BATCH = 10_000, 10_000_000, 64
MEMBER_BYTES = 1536  # a header and up to two blocks of data
MAX_SECONDS, MAX_MB = 2.0, 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "graft" / "bench" / "data" / "plan")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--run", choices=["plan", "batches", "columns"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        run = call_batches if given.run == "batches" else plan
        print(json.dumps(run(given.folder, given.run == "columns")))
        return
    if not (given.folder / MANIFEST).exists():
        write(given.folder)
    print(f"{SAMPLES:,} samples in {SHARDS:,} shards, medians of {given.rounds} runs")
    misses = []
    for name in ("plan", "batches", "columns"):
        command = [sys.executable, "-m", "benchmarks.plan", "--folder", str(given.folder.absolute()), "--run", name]
        runs = [_child(command) for _ in range(given.rounds)]
        keys = ("open_s", "total_s", "peak_mb", "imports_mb")
        opened, total, peak, before = (median(run[key] for run in runs) for key in keys)
        print(f"{name:8} open_set {opened:.2f} s, to the end {total:.2f} s; peak {peak:.0f} MB, of it imports {before:.0f} MB")
        if name == "columns":
            continue
        if total > MAX_SECONDS or peak > MAX_MB + (before if name == "batches" else 0):
            misses.append(name)
    if misses:
        raise SystemExit(f"{', '.join(misses)}: over {MAX_SECONDS} s, or over {MAX_MB} MB (for batches: beyond the imports)")


def _child(command: list[str]) -> dict[str, float]:
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    found: dict[str, float] = json.loads(output)
    return found


def plan(folder: Path, columns: bool) -> dict[str, float]:
    before, start = _peak_mb(), time.perf_counter()
    opened = open_set(folder)
    middle = time.perf_counter()
    order = make_order(opened.indices("train"), opened.bounds, seed=0)
    ids = sample_indices(order, 0, BATCH, rank=0, world=8)
    assert len(ids) == BATCH // 8
    if columns:
        for name in ("offset", "size", "crc32", "label", "key"):
            opened.samples[name][ids]
    assert "torch" not in sys.modules
    return _result(before, start, middle)


def call_batches(folder: Path, _: bool) -> dict[str, float]:
    from data_shards.reader import batches

    before, start = _peak_mb(), time.perf_counter()
    opened = open_set(folder)
    middle = time.perf_counter()
    batches(opened, batch=BATCH, seed=0, rank=0, world=8)
    return _result(before, start, middle)


def _result(before: float, start: float, middle: float) -> dict[str, float]:
    end = time.perf_counter()
    return {"open_s": middle - start, "total_s": end - start, "peak_mb": _peak_mb(), "imports_mb": before}


def _peak_mb() -> float:
    # Not getrusage: its peak is inherited from the process that started this one.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    each = SAMPLES // SHARDS
    size = each * MEMBER_BYTES + 10240
    for number in range(SHARDS):
        with (folder / f"shard-{number:06d}.tar").open("wb") as file:
            file.truncate(size)
    rng = np.random.default_rng(0)
    rows = {
        "offset": np.tile(np.arange(each) * MEMBER_BYTES + 512, SHARDS),
        "size": rng.integers(300, 1000, SAMPLES),
        "crc32": rng.integers(0, 1 << 32, SAMPLES),
        "label": rng.integers(0, 1000, SAMPLES),
        "split": np.zeros(SAMPLES),
        "suffix": np.zeros(SAMPLES),
        "key": np.char.mod("k%07d", np.arange(SAMPLES)).astype("S8"),
    }
    assert rows.keys() == COLUMNS.keys()
    manifest = Manifest(
        name="plan",
        image_shape=(3, 64, 64),
        classes=tuple(f"class-{number}" for number in range(1000)),
        licence="none",
        source="made up",
        splits={"train": SAMPLES, "reference": 0},
        shards=tuple(Shard(name=f"shard-{number:06d}.tar", size=size, sha256=f"{number:064x}", samples=each)
                     for number in range(SHARDS)),
    )
    write_set(folder, manifest, rows)


if __name__ == "__main__":
    main()
