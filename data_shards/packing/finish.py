"""What is done when all shards are made: copies are taken out, the table and the manifest are written."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from data_shards.errors import UserError
from data_shards.files import write_bytes
from data_shards.images import ENCODINGS
from data_shards.manifest import COLUMNS, MANIFEST, SAMPLES, SPLITS, Manifest, Shard, write_set
from data_shards.packing.copies import MAX_PAIRS, exact_copies, near_pairs
from data_shards.packing.place import Place, Say, clear_work, get, put, replace_shard
from data_shards.packing.plan import NO_NEAR, Plan
from data_shards.packing.record import Record
from data_shards.packing.shard import TarFile
from data_shards.sources.base import Source, pick
from data_shards.tarfiles import BLOCK

DUPLICATES, NEAR_DUPLICATES = "duplicates.csv", "near_duplicates.csv"


@dataclass(frozen=True)
class About:
    """What the manifest says beside what is found in the images."""

    name: str
    licence: str = "unknown"
    origin: str = "unknown"
    reference: float | None = None  # the share that was drawn; None where the splits were given
    keep_duplicates: bool = False
    provenance: dict[str, Any] = field(default_factory=dict)


def finish(place: Place, plan: Plan, records: dict[int, Record], source: Source, about: About, say: Say) -> None:
    """Makes the set of its finished shards (all of `plan`'s), in `place`.

    Raises `UserError` if no image is left.
    """
    numbers = sorted(records)
    bad = sorted(entry for record in records.values() for entry in record.bad)
    rows = _Rows(records)
    if not len(rows.index):
        raise UserError(f"no image is left to pack into {about.name}; the first was left out because {bad[0][1]}")
    kept_for = np.arange(len(rows.index)) if about.keep_duplicates else exact_copies(rows.hash, rows.split, rows.index)
    dropped = kept_for != np.arange(len(kept_for))
    files: dict[str, bytes] = {}
    if dropped.any():
        files[DUPLICATES] = _duplicates(rows, kept_for, np.flatnonzero(dropped), source)
        say(f"{int(dropped.sum())} exact copies are left out; {DUPLICATES} lists them")
    shards = _settle(place, records, numbers, np.split(dropped, rows.bounds[1:-1]))
    rows = _Rows(records).only(~dropped)
    packing = _describe(plan, source, about)
    if plan.options.near != NO_NEAR:
        pairs, bits, capped = near_pairs(rows.near, plan.options.near)
        crossing = rows.split[pairs[:, 0]] != rows.split[pairs[:, 1]]
        packing |= {"near_pairs": len(pairs), "near_pairs_crossing": int(crossing.sum()), "near_pairs_capped": capped}
        if len(pairs):
            files[NEAR_DUPLICATES] = _near_duplicates(rows, pairs, bits, source)
    manifest = Manifest(
        name=about.name,
        image_shape=plan.options.shape,
        classes=source.classes,
        licence=about.licence,
        source=about.origin,
        splits={split: int((rows.split == index).sum()) for index, split in enumerate(SPLITS)},
        suffixes=(ENCODINGS[plan.options.encoding],),
        packing=packing,
        provenance=about.provenance,
        bad=tuple(bad),
        duplicates=int(dropped.sum()),
        shards=tuple(shards),
    )
    _write(place, manifest, rows.table, files)
    clear_work(place, plan.shards)


class _Rows:
    """The columns of all records, one behind the other."""

    def __init__(self, records: dict[int, Record]) -> None:
        ordered = [records[number] for number in sorted(records)]
        self.bounds = np.cumsum([0, *(record.rows for record in ordered)])
        self.table = {name: np.concatenate([record.columns[name] for record in ordered]) for name in COLUMNS}
        self.split, self.label = self.table["split"], self.table["label"]
        self.index = np.concatenate([record.columns["index"] for record in ordered])
        self.hash = np.concatenate([record.columns["hash"] for record in ordered])
        self.near = np.concatenate([record.columns["near"] for record in ordered])

    def only(self, kept: np.ndarray) -> _Rows:
        """The same without the rows that are not kept."""
        if not kept.all():
            self.table = {name: column[kept] for name, column in self.table.items()}
            self.split, self.label = self.table["split"], self.table["label"]
            self.index, self.hash, self.near = self.index[kept], self.hash[kept], self.near[kept]
        return self


def _settle(
    place: Place, records: dict[int, Record], numbers: Sequence[int], dropped: Sequence[np.ndarray]
) -> list[Shard]:
    """Takes the dropped samples out of their tars, numbers the shards that are left, and returns them.

    Most shards lose nothing and keep their names. `records` are brought up to date.
    """
    shards: list[Shard] = []
    for number, drop in zip(numbers, dropped, strict=True):
        old = records[number]
        name = "" if drop.all() else f"shard-{len(shards):06d}.tar"
        if name != old.name or (drop != old.columns["dropped"]).any():
            new, tar = replace(old, name=name), None
            if not name:
                new = replace(new, columns={**old.columns, "dropped": drop})
            elif (drop != old.columns["dropped"]).any():
                new, tar = _without(place, new, old, drop)
            replace_shard(place, number, old, new, tar)
            records[number] = new
        if name:
            record = records[number]
            shards.append(Shard(name=name, size=record.size, sha256=record.sha256, samples=int(record.kept.sum())))
    return shards


def _without(place: Place, new: Record, old: Record, drop: np.ndarray) -> tuple[Record, Path]:
    """A copy of a shard's tar without some samples: its record and its file."""
    path = get(place, old)
    temporary = place.work / f"shard-{old.name}"
    columns, offsets = old.columns, old.columns["offset"].copy()
    with path.open("rb") as source, temporary.open("wb", buffering=1 << 20) as target:
        tar = TarFile(target)
        for row in np.flatnonzero(old.kept & ~drop).tolist():
            # A sample is its label's header and block, if it has one, then the image's header and bytes.
            before = BLOCK + (2 * BLOCK if columns["label"][row] >= 0 else 0)
            size = before + -(-int(columns["size"][row]) // BLOCK) * BLOCK
            source.seek(int(columns["offset"][row]) - before)
            offsets[row] = tar.size + before
            tar.write(source.read(size))
        tar.end()
        target.flush()
        os.fsync(target.fileno())
    if place.url:
        path.unlink()
    return replace(new, columns={**columns, "offset": offsets, "dropped": drop}).in_tar(new.name, tar), temporary


def _describe(plan: Plan, source: Source, about: About) -> dict[str, Any]:
    """What the manifest says of how the images were made."""
    options = plan.options
    channels, height, width = options.shape
    encoding = {"png": "PNG, lossless", "webp": "WebP, lossless", "jpeg": f"JPEG, quality {options.quality}, 4:4:4"}
    found: dict[str, Any] = {"seed": options.seed, "encoding": encoding[options.encoding], "pillow": PIL.__version__,
                             "shard_samples": plan.shard_samples, "keep_duplicates": about.keep_duplicates}
    if source.kind not in ("samples", "made"):
        found |= {
            "source_kind": source.kind,
            "size": f"EXIF orientation applied; antialiased Lanczos until it covers {height} x {width} pixels, then its centre",
            "colour": "RGB" if channels == 3 else "ITU-R 601-2 luma",
            "background": options.background,
        }
    if about.reference is not None:
        found["reference"] = about.reference
    if options.near != NO_NEAR:
        found["near"] = f"dHash of 64 bits, at most {options.near} apart, at most {MAX_PAIRS} pairs"
    return found


def _duplicates(rows: _Rows, kept_for: np.ndarray, dropped: np.ndarray, source: Source) -> bytes:
    order = dropped[np.argsort(rows.index[dropped], kind="stable")]
    kept = kept_for[order]
    lines = zip(_names(source, rows.index[order]), _splits(rows, order), _classes(source, rows, order),
                _names(source, rows.index[kept]), _splits(rows, kept), _classes(source, rows, kept), strict=True)
    return _csv(("left_out", "split", "class", "kept", "kept_split", "kept_class"), lines)


def _near_duplicates(rows: _Rows, pairs: np.ndarray, bits: np.ndarray, source: Source) -> bytes:
    one, two = pairs[:, 0], pairs[:, 1]
    crossing = np.where(rows.split[one] != rows.split[two], "yes", "no").tolist()
    lines = zip(_names(source, rows.index[one]), _splits(rows, one), _names(source, rows.index[two]), _splits(rows, two),
                bits.tolist(), crossing, strict=True)
    return _csv(("image", "split", "other", "other_split", "bits", "crosses_splits"), lines)


def _names(source: Source, indices: np.ndarray) -> Sequence[str]:
    return source.part(indices).names


def _splits(rows: _Rows, chosen: np.ndarray) -> list[str]:
    return pick(SPLITS, rows.split[chosen])


def _classes(source: Source, rows: _Rows, chosen: np.ndarray) -> list[str]:
    return ["" if label < 0 else source.classes[label] for label in rows.label[chosen].tolist()]


def _csv(head: Sequence[str], lines: Any) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(lines)
    return text.getvalue().encode("utf-8", "replace")


def _write(place: Place, manifest: Manifest, table: dict[str, np.ndarray], files: dict[str, bytes]) -> None:
    """Writes what stands beside the shards; in a store too the manifest comes last."""
    folder = place.work / "set" if place.url else place.folder
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        write_bytes(folder / name, data)
    write_set(folder, manifest, table)
    if place.url:
        for name in (*files, *(f"{SAMPLES}/{column}.npy" for column in COLUMNS), MANIFEST):
            put(place, folder / name, name)
