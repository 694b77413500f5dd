"""A set: a folder of plain WebDataset tars with `manifest.json` and `samples.npy` beside them.

`manifest.json` says what the set is and lists its shards; `samples.npy` is a structured array with one row per sample,
in the order in which they lie in the shards, opened by memory map so that ten million rows cost no memory. The manifest
holds the sha256 of every shard and of `samples.npy`, and of itself, so that nothing can change unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_shards.errors import DamagedShard, UserError
from data_shards.images import check_shape
from data_shards.tarfiles import damaged, file_size, local_path

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
SAMPLES = "samples.npy"
SPLITS = ("train", "reference")
MAX_MANIFEST_BYTES = 64 * 1024 * 1024


class Shard(BaseModel):
    """One tar of a set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="file name beside the manifest", pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,199}\.tar$")
    size: int = Field(description="bytes", ge=0)
    sha256: str = Field(description="hash of the file", pattern=r"^[0-9a-f]{64}$")
    samples: int = Field(description="number of samples", ge=1)


class Manifest(BaseModel):
    """What `manifest.json` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = Field(description="version of this layout")
    name: str = Field(description="name of the set, such as quickdraw/source")
    image_shape: tuple[int, int, int] = Field(description="(C, H, W) of every image")
    value_range: tuple[int, int] = Field(default=(0, 255), description="smallest and largest value a pixel may have")
    classes: tuple[str, ...] = Field(description="class names; a label is an index into them")
    licence: str = Field(description="licence of the images")
    source: str = Field(description="where the images came from")
    splits: dict[str, int] = Field(description="samples in each split, train and reference")
    seed: int = Field(default=0, description="seed of the packing order and of the split")
    bad: tuple[tuple[str, str], ...] = Field(default=(), description="files that were left out, with the reason")
    shards: tuple[Shard, ...] = Field(description="the tars, in the order of samples.npy", min_length=1)
    samples_sha256: str = Field(description="hash of samples.npy", pattern=r"^[0-9a-f]{64}$")
    sha256: str = Field(default="", description="hash of all the fields above: the identity of the set")

    def content_hash(self) -> str:
        """sha256 of the manifest without its own hash; it covers every shard through their hashes."""
        content = self.model_dump(mode="json", exclude={"sha256"})
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sample_dtype(key_bytes: int) -> np.dtype[Any]:
    """The row of `samples.npy`; `offset` and `size` are the image member's data in its shard, in bytes."""
    return np.dtype(
        [
            ("shard", "<u4"),
            ("offset", "<u8"),
            ("size", "<u4"),
            ("crc32", "<u4"),  # of the image's bytes: a flipped bit need not stop an image from decoding
            ("label", "<i4"),  # -1 where there is none
            ("split", "u1"),  # index into SPLITS
            ("ext", "S4"),  # suffix of the image member
            ("key", f"S{max(1, key_bytes)}"),
        ]
    )


@dataclass(frozen=True)
class ShardSet:
    """An opened set: its folder and its manifest. `samples` maps `samples.npy` into memory on first use."""

    path: Path
    manifest: Manifest

    @cached_property
    def samples(self) -> np.ndarray:
        """The rows of `samples.npy`, dtype `sample_dtype(...)`, read-only."""
        return _open_samples(self.path)

    def __len__(self) -> int:
        return sum(self.manifest.splits.values())

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be pickled as a full copy into every loader process.
        return {"path": self.path, "manifest": self.manifest}

    def indices(self, split: str = "train", label: int | str | None = None) -> np.ndarray:
        """Returns the sample ids of a split, int64 ascending, optionally of one class (index or name).

        Raises `UserError` for an unknown split or class, naming those there are.
        """
        if split not in SPLITS:
            raise UserError(f"split {split!r} does not exist; a set has the splits {', '.join(SPLITS)}")
        chosen = self.samples["split"] == SPLITS.index(split)
        if label is not None:
            chosen &= self.samples["label"] == self.label_index(label)
        return np.flatnonzero(chosen)

    def label_index(self, label: int | str) -> int:
        """Returns the index of a class given by index or name; raises `UserError` naming the classes."""
        classes = self.manifest.classes
        if isinstance(label, str) and label in classes:
            return classes.index(label)
        if not isinstance(label, str) and 0 <= label < len(classes):
            return int(label)
        names = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
        raise UserError(f"set {self.manifest.name} has no class {label!r}; its classes are: {names or 'none'}")

    def shard_path(self, shard: int) -> Path:
        """The file of the shard with that number."""
        return self.path / self.manifest.shards[shard].name


def open_set(path: str | os.PathLike[str]) -> ShardSet:
    """Opens the set in folder `path` and checks what is cheap to check: hashes of the manifest and of `samples.npy`,
    rows that lie inside their shards, and the size of every shard file (`verify` hashes those).

    Raises `UserError` naming the remedy if the folder or its manifest is missing or does not hold together, and
    `DamagedShard` naming the shard.
    """
    folder = local_path(path)
    if not folder.is_dir():
        raise UserError(
            f"there is no folder of shards at {folder}; run `graft shards fetch NAME` or `graft shards pack SRC --out"
            f" {folder}`"
        )
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"folder {folder} holds no {MANIFEST}; run `graft shards index {folder}` to make one for its tars"
        )
    manifest = _read_manifest(folder / MANIFEST)
    if not (folder / SAMPLES).is_file() or hash_file(folder / SAMPLES) != manifest.samples_sha256:
        raise UserError(
            f"{folder / SAMPLES} is missing or not the file its manifest describes; run `graft shards index {folder}`,"
            " or fetch or pack the set again"
        )
    result = ShardSet(folder, manifest)
    _check_rows(result)
    for shard in manifest.shards:
        size = file_size(folder / shard.name)
        if size != shard.size:
            reason = f"it has {size} bytes where the manifest says {shard.size}"
            raise damaged(folder / shard.name, min(size, shard.size), reason)
    return result


def info(shard_set: ShardSet) -> dict[str, Any]:
    """Returns what a person asks of a set: name, shape, classes, licence, counts, bytes, hash; JSON-ready."""
    manifest = shard_set.manifest
    fields = ("name", "image_shape", "value_range", "licence", "source", "splits", "schema_version", "sha256")
    data = manifest.model_dump(mode="json", include=set(fields))
    labels = shard_set.samples["label"]
    return {
        **{name: data[name] for name in fields},
        "path": str(shard_set.path),
        "samples": len(shard_set),
        "shards": len(manifest.shards),
        "bytes": sum(shard.size for shard in manifest.shards),
        "classes": {name: int((labels == index).sum()) for index, name in enumerate(manifest.classes)},
        "unlabelled": int((labels < 0).sum()),
        "bad": [list(pair) for pair in manifest.bad],
    }


def verify(shard_set: ShardSet, progress: Callable[[int, int], None] | None = None) -> None:
    """Hashes every shard anew; `progress(done, total)` is called after each, in shards.

    Raises `DamagedShard` naming the first shard whose bytes are not those of the manifest.
    """
    shards = shard_set.manifest.shards
    for number, shard in enumerate(shards):
        path = shard_set.path / shard.name
        if file_size(path) != shard.size or hash_file(path) != shard.sha256:
            raise DamagedShard(f"shard {path} does not have the sha256 of its manifest; fetch or pack the set again")
        if progress:
            progress(number + 1, len(shards))


def write_set(folder: Path, manifest: Manifest, rows: np.ndarray) -> Manifest:
    """Writes `samples.npy` and then, last, `manifest.json` with both hashes filled in; returns that manifest."""
    temporary = folder / f".{SAMPLES}.tmp"
    with temporary.open("wb") as file:
        np.save(file, rows, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / SAMPLES)
    manifest = manifest.model_copy(update={"samples_sha256": hash_file(folder / SAMPLES)})
    manifest = manifest.model_copy(update={"sha256": manifest.content_hash()})
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    return manifest


def write_json(path: Path, content: Any) -> None:
    """Writes JSON to a temporary name, fsyncs it and renames it into place."""
    temporary = path.parent / f".{path.name}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def hash_file(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(path: Path) -> Manifest:
    remedy = f"run `graft shards index {path.parent}`, or fetch or pack the set again"
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise UserError(f"{path} has over {MAX_MANIFEST_BYTES} bytes and is no manifest; {remedy}")
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); {remedy}") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {version}, and this graft reads up to {SCHEMA_VERSION}; update graft"
        )
    try:
        manifest = Manifest.model_validate(data)
        check_shape(manifest.image_shape)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} is no manifest: {where or 'it'}: {first['msg']}; {remedy}") from None
    if manifest.sha256 != manifest.content_hash():
        raise UserError(f"{path} was changed after it was written, its hash does not hold; {remedy}")
    return manifest


def _open_samples(folder: Path) -> np.ndarray:
    try:
        rows: np.ndarray = np.load(folder / SAMPLES, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{folder / SAMPLES} cannot be read ({error}); run `graft shards index {folder}`") from None
    width = rows.dtype["key"].itemsize if rows.dtype.names and "key" in rows.dtype.names else 0
    if rows.ndim != 1 or rows.dtype != sample_dtype(width):
        raise UserError(f"{folder / SAMPLES} does not hold sample rows; run `graft shards index {folder}`")
    return rows


def _check_rows(shard_set: ShardSet) -> None:
    """The hashes say that the files are the written ones; this says that they are consistent, whoever wrote them."""
    manifest, rows = shard_set.manifest, shard_set.samples
    shard, end = rows["shard"].astype(np.int64), rows["offset"].astype(np.int64) + rows["size"]
    sizes = np.array([entry.size for entry in manifest.shards], np.int64)
    counts = np.array([entry.samples for entry in manifest.shards], np.int64)
    sound = (
        len(rows) == counts.sum()
        and (shard == np.repeat(np.arange(len(counts)), counts)).all()
        and (rows["offset"] >= 512).all()
        and (rows["offset"] < 1 << 62).all()
        and (end <= sizes[shard]).all()
        and (rows["label"] >= -1).all()
        and (rows["label"] < len(manifest.classes)).all()
        and len({entry.name for entry in manifest.shards}) == len(manifest.shards)
        and manifest.splits == {name: int((rows["split"] == index).sum()) for index, name in enumerate(SPLITS)}
        and sum(manifest.splits.values()) == len(rows)
    )
    if not sound:
        raise UserError(
            f"{shard_set.path / SAMPLES} and its manifest do not agree; run `graft shards index {shard_set.path}`,"
            " or fetch or pack the set again"
        )
