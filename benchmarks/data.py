"""How fast graft reads, beside other loaders, on the same images: `python -m benchmarks.data [--quick] [--json PATH]`.

Every contestant runs in fresh processes, one at a time, in rounds: each round runs all of them in turn, beginning with
another one, and a ratio is the median over the rounds of the ratios within a round, so that a machine that is slow for a
while is slow for all. "A core" divides by the processor seconds of the second epoch, of all
its processes: where other programs share the machine, that is the figure to trust. The work is the same for all: batches of
64 shuffled uint8 images and their labels, as torch tensors, in the main process. A run apart from the timed ones adds up
every pixel and label, and looks at the memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.peers.environments import HOME, python_of, versions
from benchmarks.peers.measure import Job
from benchmarks.peers.s3 import empty, s3_server, upload
from benchmarks.peers.sets import Images, colour_images, gray_images

ROOT = Path(__file__).parents[1]
BATCH = 64
CONTESTANTS = {
    "graft": "cache_bytes=0: every image is read, checked and decoded each time, as the peers do",
    "graft-cached": "its default: decoded images are kept while all of them fit in 256 MiB",
    "webdataset": "graft's own tars; shardshuffle=100, shuffle(1000), batched in workers, WebLoader",
    "mosaicml-streaming": "MDS, columns bytes and int, shards of 64 MiB; shuffle py1e; StreamingDataLoader",
    "litdata": "chunks of 64 MB of bytes and a label; shuffle; StreamingDataLoader",
    "limit": "a bare loop of pread and Pillow into one array, unchecked, one for each worker; nothing handed over",
    "limit-frombytes": "the same with the decoding call that graft uses for plain PNGs",
}
_MODULES = {"graft-cached": "graft", "limit-frombytes": "limit", "mosaicml-streaming": "mosaicml_streaming"}
REFERENCE = "graft"

Run = dict[str, Any]  # what one process found out, or the medians of several


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round on a tenth of the images")
    parser.add_argument("--peers", default=",".join(CONTESTANTS), help="contestants, separated by commas")
    parser.add_argument("--workers", default="0,1,2", help="numbers of loader processes on local disk")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sets", default="gray,colour")
    parser.add_argument("--gray", type=Path, help="a packed set of gray images instead of drawn strokes")
    parser.add_argument("--s3", action="store_true", help="also from an S3 server process on this machine, by 2 workers")
    parser.add_argument("--json", type=Path, help="write every single measurement there")
    given = parser.parse_args()
    peers = [name for name in given.peers.split(",") if name]
    if unknown := set(peers) - set(CONTESTANTS):
        parser.error(f"unknown contestants {', '.join(sorted(unknown))}; there are {', '.join(CONTESTANTS)}")
    rounds = 1 if given.quick else given.rounds
    scratch = HOME / "data"
    sets = []
    if "gray" in given.sets:
        sets.append(gray_images(scratch, 2560 if given.quick else 24000, given.gray))
    if "colour" in given.sets:
        sets.append(colour_images(scratch, 640 if given.quick else 6400))
    pythons = {peer: python_of(peer) for peer in peers}
    record: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "versions": versions(), "rows": []}
    print(f"{record['machine']}; Python {platform.python_version()}, "
          + ", ".join(f"{name} {version}" for name, version in record["versions"].items()))
    for peer in peers:
        print(f"  {peer}: {CONTESTANTS[peer]}")
    for images in sets:
        for workers in (int(text) for text in given.workers.split(",") if text):
            rows = compare(images, workers, peers, pythons, rounds)
            record["rows"] += rows
            print(table(images, workers, rounds, rows), flush=True)
            _save(given.json, record)
    if given.s3:
        with s3_server():
            for images in sets:
                rows = compare(images, 2, [peer for peer in peers if "limit" not in peer], pythons, rounds, remote=True)
                record["rows"] += rows
                print(table(images, 2, rounds, rows), flush=True)
                _save(given.json, record)


def _save(path: Path | None, record: dict[str, Any]) -> None:
    if path:
        path.write_text(json.dumps(record, indent=1) + "\n")


def compare(
    images: Images, workers: int, peers: list[str], pythons: dict[str, str], rounds: int, remote: bool = False
) -> list[Run]:
    """One row for each contestant: the medians, and every single measurement."""
    jobs = {peer: _job(images, peer, workers) for peer in peers}
    if remote:
        for peer, job in jobs.items():
            _run(pythons[peer], replace(job, check=True))  # so that each peer's own form is written
            own = Path(job.folder) if Path(job.folder).exists() else Path(job.source)
            jobs[peer] = replace(job, url=upload(own, f"{images.scratch.name}/{peer}"))
    checks = {peer: _run(pythons[peer], replace(job, check=True)) for peer, job in jobs.items()}
    _agree(images, checks)
    runs: dict[str, list[Run]] = {peer: [] for peer in peers}
    for number in range(rounds):
        first = number % len(peers)
        for peer in peers[first:] + peers[:first]:
            runs[peer].append(_run(pythons[peer], jobs[peer]))
    return [_row(images, workers, peer, runs, checks[peer], remote) for peer in peers]


def _job(images: Images, peer: str, workers: int) -> Job:
    manifest = images.source.manifest
    count = len(images.source) // BATCH * BATCH
    return Job(peer, str(images.source.path), str(images.samples), str(images.scratch / peer), count, manifest.image_shape,
               workers, BATCH, cache=peer == "graft-cached")


def _run(python: str, job: Job) -> Run:
    """One process of a contestant. When checking, its largest proportional set size, with its children's, is added."""
    if job.url:
        os.environ["GRAFT_CACHE"] = empty(f"{job.folder}.local")
    command = [python, "-m", f"benchmarks.peers.{_MODULES.get(job.peer, job.peer)}", json.dumps(asdict(job))]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        peak = 0
        while job.check and process.poll() is None:
            peak = max(peak, _proportional_bytes(process.pid))
            time.sleep(0.05)
        output, errors = process.communicate()
    found = [line.removeprefix("RESULT ") for line in output.splitlines() if line.startswith("RESULT ")]
    if len(found) != 1:
        raise SystemExit(f"{job.peer} ended with {process.returncode} and no result:\n{output[-2000:]}\n{errors[-4000:]}")
    result: Run = json.loads(found[0])
    return result | {"peak_bytes": peak}


def _proportional_bytes(pid: int) -> int:
    total = 0
    try:
        main_process = psutil.Process(pid)
        for process in (main_process, *main_process.children(recursive=True)):
            total += process.memory_full_info().pss
    except psutil.Error:
        return 0
    return total


def _agree(images: Images, checks: dict[str, Run]) -> None:
    """Every contestant that reads whole epochs must have delivered the same images and labels."""
    found = {(check["images"], check["labels"], check["pixels"]): peer for peer, check in checks.items() if "limit" not in peer}
    if len(found) > 1:
        raise SystemExit(f"{images.title}: (images, sum of labels, sum of pixels) differ: {found}")


def _row(images: Images, workers: int, peer: str, runs: dict[str, list[Run]], check: Run, remote: bool) -> Run:
    def rates(of: str, epoch: int, per: str = "seconds") -> list[float]:
        return [run["epochs"][epoch]["images"] / max(1e-3, run["epochs"][epoch][per]) for run in runs[of]]

    def ratio(epoch: int, per: str = "seconds") -> float:
        reference = REFERENCE if REFERENCE in runs else peer
        pairs = zip(rates(reference, epoch, per), rates(peer, epoch, per), strict=True)
        return median(ours / theirs for ours, theirs in pairs)

    return {
        "set": images.title,
        "from": "S3" if remote else "disk",
        "workers": workers,
        "peer": peer,
        "first_epoch_images_s": median(rates(peer, 0)),
        "second_epoch_images_s": median(rates(peer, 1)),
        "images_s_a_core": median(rates(peer, 1, "cpu_seconds")),
        "graft_to_it_first": ratio(0),
        "graft_to_it_second": ratio(1),
        "graft_to_it_a_core": ratio(1, "cpu_seconds"),
        "first_batch_s": median(run["first_batch"] for run in runs[peer]),
        "peak_bytes": check["peak_bytes"],
        "imports_bytes": check["imports_bytes"],
        "runs": runs[peer],
    }


def table(images: Images, workers: int, rounds: int, rows: list[Run]) -> str:
    manifest = images.source.manifest
    size = sum(shard.size for shard in manifest.shards) / 1e6
    lines = [
        f"\n{images.title}: {len(images.source):,} of {manifest.image_shape}, {size:.0f} MB of tars, {workers} workers, "
        f"{'an S3 server on this machine, caches empty before epoch 1' if rows[0]['from'] == 'S3' else 'local disk'}, "
        f"medians of {rounds} rounds",
        f"{'':20}{'images/s':>30}{'graft is':>24}{'first':>9}{'peak MB':>9}{'of it':>9}",
        f"{'':20}{'epoch 1':>10}{'epoch 2':>10}{'a core':>10}{'epoch 1':>8}{'epoch 2':>8}{'a core':>8}"
        f"{'batch':>9}{'(PSS)':>9}{'imports':>9}",
    ]
    for row in rows:
        lines.append(
            f"{row['peer']:20}{row['first_epoch_images_s']:>10,.0f}{row['second_epoch_images_s']:>10,.0f}"
            f"{row['images_s_a_core']:>10,.0f}{row['graft_to_it_first']:>7.2f}x{row['graft_to_it_second']:>7.2f}x"
            f"{row['graft_to_it_a_core']:>7.2f}x"
            f"{row['first_batch_s'] * 1000:>6.0f} ms{row['peak_bytes'] / 1e6:>9.0f}{row['imports_bytes'] / 1e6:>9.0f}"
        )
    return "\n".join(lines)


def machine() -> str:
    """The processor in lscpu's words, cores and memory."""
    lines = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout.splitlines()
    fields = {name.strip(): value.strip() for name, value in (line.split(":", 1) for line in lines if ":" in line)}
    words = [fields.get(name, "?") for name in ("Model name", "CPU family", "BogoMIPS")]
    memory = psutil.virtual_memory().total / 2**30
    return f"{os.cpu_count()} cores of {words[0]}, family {words[1]} ({words[2]} BogoMIPS), {memory:.0f} GiB"


if __name__ == "__main__":
    main()
