"""Images to a set: plain WebDataset tars with reproducible bytes, and the manifest last.

`pack_source` packs what lies in files, `pack_images` samples in memory, `pack_arrays` what a function makes. A pack that
was killed goes on from its finished shards when the same is asked for again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import PIL

from data_shards.errors import UserError
from data_shards.images import BACKGROUND, QUALITY
from data_shards.manifest import SPLITS, ShardSet, open_set
from data_shards.packing.finish import About, finish
from data_shards.packing.place import Place, Say, open_place, resume
from data_shards.packing.plan import NO_NEAR, SHARD_BYTES, SHARD_SAMPLES, Options, make_plan
from data_shards.packing.shard import Done, make_shard
from data_shards.packing.workers import Tick, over_processes
from data_shards.sources import Options as SourceOptions
from data_shards.sources import open_source
from data_shards.sources.base import MapFn, Source
from data_shards.sources.made import Make, Sample, from_function, from_samples
from data_shards.tarfiles import local_path

FORMAT = 1  # of what packing makes of the same input; changes when that does

Progress = Callable[[int, int, int], None]  # images done, images in all, bytes of the shards so far


@dataclass(frozen=True)
class _Run:
    """How packing goes: where its work is done and whom it tells; none of it changes what comes out."""

    processes: int
    map_fn: MapFn | None
    progress: Progress
    say: Say


@dataclass(frozen=True)
class Outline:
    """What would be packed, for `--dry-run`."""

    kind: str
    images: int
    classes: tuple[str, ...]
    reference: int  # images held out
    shards: int
    shard_samples: int
    notes: tuple[str, ...]


def pack_source(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    size: int,
    channels: int = 3,
    *,
    kind: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    reference: float = 0.0,
    encoding: str = "png",
    quality: int = QUALITY,
    background: int = BACKGROUND,
    keep_duplicates: bool = False,
    near: int = 4,
    max_bad: int = 0,
    seed: int = 0,
    shard_samples: int = SHARD_SAMPLES,
    shard_bytes: int = SHARD_BYTES,
    name: str | None = None,
    licence: str = "unknown",
    origin: str | None = None,
    scratch: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    processes: int = 1,
    progress: Progress | None = None,
    say: Say | None = None,
    map_fn: MapFn | None = None,
) -> ShardSet:
    """Packs a folder, archive, array or table of images into the set `out`, fitted to `size` x `size` pixels.

    Args:
        source: a folder, or a .zip, .tar, .npz, .npy or .parquet file, or a folder of .parquet or WebDataset .tar files.
        out: a folder that is not there yet, or the URL of a place in an object store.
        channels: 1 (gray) or 3 (RGB).
        kind: of the source, from `data_shards.sources.KINDS`; None tells it from its name and content.
        image_column, label_column: columns, arrays or member suffixes, where they cannot be told.
        reference: share (0 <= x < 1) of the images held out, by `seed`, as the split "reference"; drawn before all else.
        encoding: png or webp (without loss) or jpeg, at `quality` 1 to 100.
        background: gray value (0 to 255) that transparency is put on.
        keep_duplicates: whether exact copies stay; else one of each is kept, a held-out one first.
        near: number of bits of 64 in which near copies may differ to be listed in near_duplicates.csv; -1 lists none.
        max_bad: images that cannot be read before it is an error; they are listed in the manifest with the reason.
        shard_samples, shard_bytes: bounds of a shard.
        scratch: folder for what a compressed source is unpacked to; beside the unfinished set if None.
        processes: how many of this machine make shards; `map_fn` maps over the shards in their stead, as on a cluster.
        progress: called with (images done, images in all, bytes so far).
        say: called with sentences that a user may want to read.

    Raises:
        UserError: for a source that is missing, damaged or hostile, labels or options that do not fit, an existing `out`
            (without `overwrite`), too many bad images, or nothing left to pack.
    """
    path = local_path(source).absolute()
    options = _options(size, channels, encoding=encoding, quality=quality, background=background, seed=seed,
                       shard_samples=shard_samples, shard_bytes=shard_bytes, near=near)
    title = path.resolve().name
    about = About(name or title, licence, origin or title, reference, keep_duplicates)
    run = _Run(processes, map_fn, progress or _unseen, say or _unheard)
    with open_place(out, overwrite) as place:
        folder = place.work / "stage" if scratch is None else local_path(scratch).absolute()
        opened = open_source(path, SourceOptions(folder, image_column, label_column), kind)
        _pack(opened, place, options, about, max_bad, run, folder)
    return open_set(out)


def outline(
    source: str | os.PathLike[str],
    size: int,
    channels: int = 3,
    *,
    scratch: Path,
    kind: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    reference: float = 0.0,
    **options: Any,
) -> Outline:
    """What `pack_source` would make of the same arguments; unpacks into `scratch` where it must, and writes nothing else."""
    checked = _options(size, channels, **options)
    opened = open_source(local_path(source), SourceOptions(scratch, image_column, label_column), kind)
    plan = make_plan(opened, checked, reference)
    held = int((plan.splits == SPLITS.index("reference")).sum())
    return Outline(opened.kind, len(opened), opened.classes, held, plan.shards, plan.shard_samples, opened.notes)


def pack_images(
    samples: Iterable[Sample],
    out: str | os.PathLike[str],
    *,
    name: str,
    shape: tuple[int, int, int],
    classes: Sequence[str] = (),
    encoding: str = "png",
    quality: int = QUALITY,
    keep_duplicates: bool = True,
    shard_samples: int = SHARD_SAMPLES,
    shard_bytes: int = SHARD_BYTES,
    licence: str = "unknown",
    source: str = "unknown",
    seed: int = 0,
    max_bad: int = 0,
    overwrite: bool = False,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
    say: Say | None = None,
    map_fn: MapFn | None = None,
) -> ShardSet:
    """Packs samples that are in memory, already of `shape`, into the set `out`: `<key>.png`, and `<key>.cls` where there is
    a label. The same input and seed give the same bytes. Other arguments are as in `pack_source`, but copies stay
    and `progress` is called with (images done, images in all).

    Raises `UserError` as `pack_source` does, and for a key or label that is not valid.
    """
    opened = from_samples(list(samples), name, classes)
    options = Options(shape, encoding, quality, BACKGROUND, seed, shard_samples, shard_bytes, NO_NEAR)
    about = About(name, licence, source, None, keep_duplicates)
    shown = _unseen if progress is None else lambda done, total, _written: progress(done, total)
    run = _Run(processes, map_fn, shown, say or _unheard)
    with open_place(out, overwrite) as place:
        _pack(opened, place, options, about, max_bad, run)
    return open_set(out)


def pack_arrays(
    make: Make,
    count: int,
    out: str | os.PathLike[str],
    *,
    name: str,
    shape: tuple[int, int, int],
    identity: str,
    classes: Sequence[str] = (),
    provenance: Mapping[str, Any] | None = None,
    reference: float = 0.0,
    encoding: str = "png",
    quality: int = QUALITY,
    keep_duplicates: bool = True,
    near: int = NO_NEAR,
    shard_samples: int = SHARD_SAMPLES,
    shard_bytes: int = SHARD_BYTES,
    licence: str = "unknown",
    source: str = "generated",
    seed: int = 0,
    overwrite: bool = False,
    processes: int = 1,
    progress: Progress | None = None,
    say: Say | None = None,
    map_fn: MapFn | None = None,
) -> ShardSet:
    """Packs the images that `make(0)` to `make(count - 1)` give, each (uint8 (C, H, W) of `shape`, label or -1).

    `make` gives the same for the same number in any process; for several processes it can be pickled. `identity` changes
    when what it makes does: a killed pack of the same identity goes on. `provenance` stands in the manifest (checkpoint,
    its hash, seed, truncation). Other arguments are as in `pack_source`, but copies stay and near ones are not looked for.

    Raises `UserError` as `pack_source` does.
    """
    opened = from_function(make, count, classes, identity)
    options = Options(shape, encoding, quality, BACKGROUND, seed, shard_samples, shard_bytes, near)
    about = About(name, licence, source, reference, keep_duplicates, dict(provenance or {}))
    run = _Run(processes, map_fn, progress or _unseen, say or _unheard)
    with open_place(out, overwrite) as place:
        _pack(opened, place, options, about, 0, run)
    return open_set(out)


def _options(size: int, channels: int, **others: Any) -> Options:
    if size < 1 or channels not in (1, 3):
        raise UserError(f"size {size} must be at least 1 pixel and channels {channels} must be 1 (gray) or 3 (RGB)")
    return Options((channels, size, size), **others)


def _pack(
    source: Source, place: Place, options: Options, about: About, max_bad: int, run: _Run, stage: Path | None = None
) -> None:
    """Makes the shards that are not there yet, and of all of them the set."""
    plan = make_plan(source, options, about.reference or 0.0)
    finished = resume(place, _identity(source, options, about, plan.shard_samples), plan.shards, run.say)
    if source.stage is not None and stage is not None:
        # Never in this process: a library that reads a hostile table may end the one that it is in.
        processes = max(2, run.processes)
        run_map = run.map_fn or (lambda work, jobs: over_processes(partial(_alone, work), jobs, processes, _ignored))
        source = source.stage(stage, run_map)
    done = sum(record.rows + len(record.bad) for record in finished.values())
    written, total = sum(record.size for record in finished.values()), len(source)

    def tick(images: int, size: int) -> None:
        nonlocal done, written
        done, written = done + images, written + size
        run.progress(done, total, written)

    bad = sorted(entry for record in finished.values() for entry in record.bad)
    _check_bad(bad, max_bad)
    tick(0, 0)
    records = dict(finished)
    work = partial(make_shard, options, place, max_bad)
    tasks = plan.tasks(source, frozenset(finished))
    if run.map_fn is None:
        results = over_processes(work, tasks, min(run.processes, plan.shards - len(finished)), tick)
    else:
        results = map(_counted, run.map_fn(work, tasks), iter(lambda: tick, None))
    for result in results:
        bad += result.record.bad
        _check_bad(bad, max_bad)
        records[result.number] = result.record
    finish(place, plan, records, source, about, run.say)


def _check_bad(bad: list[tuple[str, str]], max_bad: int) -> None:
    if len(bad) > max_bad:
        raise UserError(
            f"more than the {max_bad} bad image(s) allowed by --max-bad, such as {bad[-1][0]} ({bad[-1][1]}); remove them, or"
            " allow more"
        )


def _identity(source: Source, options: Options, about: About, shard_samples: int) -> str:
    """What finished shards must agree in to be gone on from; "" for a source that cannot be known again."""
    if not source.fingerprint:
        return ""
    made = replace(options, near=min(options.near, 0), shard_samples=shard_samples, shard_bytes=0)
    content = [FORMAT, PIL.__version__, source.kind, source.fingerprint, len(source), source.classes, asdict(made),
               about.reference, about.keep_duplicates]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _counted(result: Done, tick: Tick) -> Done:
    tick(result.images, result.size)
    return result


def _alone(work: Callable[[Any], Any], task: Any, _tick: Tick) -> Any:
    return work(task)


def _unheard(_sentence: str) -> None:
    return None


def _unseen(_done: int, _total: int, _written: int) -> None:
    return None


def _ignored(_images: int, _size: int) -> None:
    return None
