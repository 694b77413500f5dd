"""Datasets by name. A new one is a file with ARCHIVE, VERSION, `sets` and SETS, and a line in `DATASETS`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards.datasets import (
    cifar10,
    emoji,
    fashion_mnist,
    histology,
    kanjivg,
    kanjivg_strokes,
    mnist,
    quickdraw,
    words,
)
from data_shards.datasets.download import Archive, get_archive
from data_shards.datasets.plan import SetPlan
from data_shards.errors import UserError
from data_shards.files import write_json
from data_shards.manifest import ShardSet, open_set, verify
from data_shards.pack import pack_images
from data_shards.tarfiles import local_path

FETCHED = "fetched.json"

# what is being done ("download", "pack", "keep"), the set's name, sets done, sets in all (0: not known yet)
FetchProgress = Callable[[str, str, int, int], None]


@dataclass(frozen=True)
class Dataset:
    """An archive at a package registry and the sets made of it; `version` changes when the sets' content does."""

    archive: Archive
    version: int
    sets: Callable[[Path], Iterator[SetPlan]]
    count: int  # of sets


@dataclass(frozen=True)
class Fetched:
    """What `fetch` left: the sets by name, and how many of them were packed now or found intact."""

    sets: dict[str, ShardSet]
    packed: int
    kept: int


DATASETS: dict[str, Dataset] = {
    "quickdraw": Dataset(quickdraw.ARCHIVE, quickdraw.VERSION, quickdraw.sets, quickdraw.SETS),
    "mnist": Dataset(mnist.ARCHIVE, mnist.VERSION, mnist.sets, mnist.SETS),
    "kanjivg": Dataset(kanjivg.ARCHIVE, kanjivg.VERSION, kanjivg.sets, kanjivg.SETS),
    "cifar10": Dataset(cifar10.ARCHIVE, cifar10.VERSION, cifar10.sets, cifar10.SETS),
    "fashion-mnist": Dataset(fashion_mnist.ARCHIVE, fashion_mnist.VERSION, fashion_mnist.sets, fashion_mnist.SETS),
    "emoji": Dataset(emoji.ARCHIVE, emoji.VERSION, emoji.sets, emoji.SETS),
    "histology": Dataset(histology.ARCHIVE, histology.VERSION, histology.sets, histology.SETS),
    "kanjivg-strokes": Dataset(
        kanjivg_strokes.ARCHIVE, kanjivg_strokes.VERSION, kanjivg_strokes.sets, kanjivg_strokes.SETS
    ),
    "words": Dataset(words.ARCHIVE, words.VERSION, words.sets, words.SETS),
}


def fetch(
    name: str,
    root: str | os.PathLike[str],
    progress: FetchProgress | None = None,
    *,
    only: Collection[str] | None = None,
) -> Fetched:
    """Writes the sets of dataset `name` under `root`/`name`, downloading its archive if it is not in the cache.

    `only` names the sets to make, such as {"mnist/source", "mnist/3"}; None makes all. Sets that are there and whose
    shards still have their hashes are kept and reported as "keep"; missing or damaged ones are packed. Raises
    `UserError` for an unknown name (listing those there are) or an archive that cannot be had.
    """
    if name not in DATASETS:
        raise UserError(f"there is no dataset {name!r}; choose one of {', '.join(sorted(DATASETS))}")
    dataset, base = DATASETS[name], local_path(root)
    report = progress or _silent
    written = _written(base / name, dataset)
    wanted = set(only) if only is not None else set(written) if len(written) == dataset.count else None
    if wanted is not None and wanted <= written.keys():
        kept = {key: found for key in sorted(wanted) if (found := _intact(base, key, written[key]))}
        if len(kept) == len(wanted):
            for done, key in enumerate(kept, start=1):
                report("keep", key, done, len(kept))
            return Fetched(kept, packed=0, kept=len(kept))
    report("download", dataset.archive.filename, 0, 0)
    plans = {plan.name: plan for plan in dataset.sets(get_archive(dataset.archive))}
    assert len(plans) == dataset.count
    if unknown := sorted((wanted or set()) - plans.keys()):
        raise UserError(f"dataset {name} has no set {unknown[0]!r}; choose among {', '.join(list(plans)[:20])}, ...")
    chosen = [plan for plan in plans.values() if wanted is None or plan.name in wanted]
    sets: dict[str, ShardSet] = {}
    packed = 0
    for plan in chosen:
        found = _intact(base, plan.name, written[plan.name]) if plan.name in written else None
        report("keep" if found else "pack", plan.name, len(sets), len(chosen))
        packed += found is None
        sets[plan.name] = found or _pack(plan, base / plan.name)
    report("done", name, len(sets), len(sets))
    hashes = written | {key: value.manifest.sha256 for key, value in sets.items()}
    record = {"schema_version": 1, "version": dataset.version, "archive_sha256": dataset.archive.sha256}
    write_json(base / name / FETCHED, {**record, "sets": hashes})
    return Fetched(sets, packed=packed, kept=len(sets) - packed)


def _pack(plan: SetPlan, out: Path) -> ShardSet:
    return pack_images(
        plan.samples(),
        out,
        name=plan.name,
        shape=plan.shape,
        classes=plan.classes,
        shard_samples=plan.shard_samples,
        licence=plan.licence,
        source=plan.source,
        seed=0,
        overwrite=True,
    )


def _written(folder: Path, dataset: Dataset) -> dict[str, str]:
    """Set names and hashes that an earlier fetch of this version recorded, {} if none did."""
    try:
        record: Any = json.loads((folder / FETCHED).read_text(encoding="utf-8"))
        if (record["version"], record["archive_sha256"]) == (dataset.version, dataset.archive.sha256):
            return {str(key): str(value) for key, value in record["sets"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # no record is the ordinary first case, and a broken one only means packing again
    return {}


def _intact(root: Path, name: str, digest: str) -> ShardSet | None:
    try:
        shard_set = open_set(root / name)
        verify(shard_set)
    except UserError:  # missing or damaged: it is packed again, and reported so
        return None
    return shard_set if shard_set.manifest.sha256 == digest else None


def _silent(_what: str, _name: str, _done: int, _total: int) -> None:
    return None
