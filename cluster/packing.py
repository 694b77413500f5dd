"""`graft shards pack`: what it would do, its progress, and packing over the nodes of a Ray cluster."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.session import NODE_TIMEOUT_S, ray_session
from data_shards.errors import UserError
from data_shards.manifest import ShardSet
from data_shards.pack import Progress, outline, pack_source
from data_shards.packing.place import check_free, is_url

AHEAD = 2  # shards handed to Ray for each of its CPUs
LINES = 4  # of progress where there is no terminal


def pack(source: str, out: str, size: int, channels: int, *, address: str | None, processes: int | None,
         scratch: str | None, **options: Any) -> ShardSet:
    """Pack `source` into `out` over the processes of this machine, or over the cluster at `address`; see `pack_source`.

    Raises:
        UserError: as `pack_source` does, and where a node cannot see `source` or `out`.
    """
    with _progress(Path(source).name) as progress:
        common = {**options, "scratch": scratch, "progress": progress, "say": _say}
        if address is None:
            count = processes or len(os.sched_getaffinity(0))
            return pack_source(source, out, size, channels, processes=count, **common)
        if processes is not None:
            raise UserError("--processes is for this machine alone and --address for a cluster's CPUs; give one of them")
        # What several nodes write must lie where all see it: the draft beside the set, or what is unpacked for a store.
        shared = scratch if is_url(out) else Path(out).absolute().parent
        check_free(out, bool(options.get("overwrite")))
        with ray_session(address, folder=shared):
            _check_seen(Path(source))
            return pack_source(source, out, size, channels, map_fn=over_cluster, **common)


def describe(source: str, out: str, size: int, channels: int, *, overwrite: bool, **options: Any) -> Iterator[str]:
    """The lines of a dry run."""
    check_free(out, overwrite)
    with tempfile.TemporaryDirectory(prefix="graft-") as scratch:
        found = outline(source, size, channels, scratch=Path(scratch), **options)
    classes = ", ".join(found.classes[:5]) + (", ..." if len(found.classes) > 5 else "")
    yield (f"{source} is of kind {found.kind}: {found.images} images, {len(found.classes)} classes"
           f"{f' ({classes})' if classes else ''}, {found.reference} held out")
    yield from found.notes
    yield (f"{out}: {found.shards} shards of at most {found.shard_samples} images, {size} x {size} "
           f"{'RGB' if channels == 3 else 'gray'}, {options['encoding']}")


def summary(made: ShardSet) -> str:
    """What was packed, in one line."""
    manifest = made.manifest
    said = (f"{len(made)} images in {len(manifest.shards)} shards, {len(manifest.bad)} left out, "
            f"{manifest.duplicates} copies left out")
    if "near_pairs" in manifest.packing:
        more = " or more" if manifest.packing["near_pairs_capped"] else ""
        said += f", {manifest.packing['near_pairs']}{more} pairs of near copies listed"
        if manifest.splits["reference"]:
            said += f" ({manifest.packing['near_pairs_crossing']} across the splits)"
    return said


def over_cluster(function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
    """`function` over `tasks` on the CPUs of the joined Ray cluster, results as they come."""
    import ray

    @ray.remote(num_cpus=1)
    def call(task: Any) -> Any:
        return function(task)

    ahead = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
    remaining = iter(tasks)
    waiting: list[Any] = []
    try:
        while True:
            while len(waiting) < ahead and (task := next(remaining, None)) is not None:
                waiting.append(call.remote(task))
            if not waiting:
                return
            done, waiting = ray.wait(waiting)
            yield from ray.get(done)
    finally:
        for left in waiting:
            ray.cancel(left)


def _check_seen(source: Path) -> None:
    """Raise `UserError` unless every node sees the same source at the same path."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    path = str(source.absolute())
    if not os.path.exists(path):
        return  # packing says so better
    wanted = _sight(path, None)
    look = ray.remote(num_cpus=0, max_retries=0)(_sight)
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    answers = {look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(path, wanted[0]): host
               for node, host in nodes.items()}
    done, _ = ray.wait(list(answers), num_returns=len(answers), timeout=NODE_TIMEOUT_S)
    blind = sorted(host for answer, host in answers.items() if answer not in done or ray.get(answer) != wanted)
    if blind:
        raise UserError(f"{source} cannot be seen from {', '.join(blind)}; put SRC on storage that all {len(nodes)} node(s) "
                        "of the cluster share, or leave --address out")


def _sight(path: str, name: str | None) -> tuple[str, int]:
    """On a node: of a folder one of its names (that name, if it is there), of a file its size."""
    try:
        if not os.path.isdir(path):
            return "", os.stat(path).st_size
        if name is not None:
            return (name if os.path.lexists(os.path.join(path, name)) else ""), -1
        return next((entry.name for entry in os.scandir(path)), ""), -1
    except OSError:
        return "", -2


@contextmanager
def _progress(label: str) -> Iterator[Progress]:
    """Images, images a second, bytes and the time left: a bar on a terminal, a few lines elsewhere."""
    start, first = time.monotonic(), -1  # images that were there already

    def rate(done: int) -> float:
        nonlocal first
        first = done if first < 0 else first
        return (done - first) / max(time.monotonic() - start, 1e-9)

    if sys.stdout.isatty() and not os.environ.get("CI"):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
                   TextColumn("left"), TimeRemainingColumn())
        with Progress(*columns) as bar:
            task = bar.add_task(label, total=None, note="")

            def draw(done: int, total: int, written: int) -> None:
                bar.update(task, completed=done, total=total, note=f"{rate(done):.0f} images/s, {written / 1e6:.0f} MB")

            yield draw
    else:
        told = 0

        def tell(done: int, total: int, written: int) -> None:
            nonlocal told
            speed, part = rate(done), LINES * done // max(total, 1)
            if done > first and told < part < LINES:
                told = part
                left = f", {(total - done) / speed:.0f} s left" if speed else ""
                print(f"{label} {done}/{total} images, {speed:.0f} images/s, {written / 1e6:.1f} MB{left}", flush=True)

        yield tell


def _say(sentence: str) -> None:
    print(sentence, flush=True)
