"""A set: a folder of plain WebDataset tars with `manifest.json` and `samples/` beside them.

`manifest.json` says what the set is and lists its shards; `samples/<column>.npy` holds one column of the table of
samples, one row per sample in the order in which they lie in the shards, opened by memory map when it is first used, so
that ten million rows cost no memory. The manifest holds the sha256 of every shard, of every column, and of itself, so
that nothing can change unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_shards.errors import DamagedShard, UserError
from data_shards.files import hash_file, sync, write_json
from data_shards.images import MAX_BYTES, check_shape
from data_shards.stores import Store, open_store
from data_shards.stores.cache import cached_file
from data_shards.tarfiles import damaged, file_size

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
SAMPLES = "samples"
SPLITS = ("train", "reference")
MAX_MANIFEST_BYTES = 64 * 1024 * 1024

COLUMNS: dict[str, str] = {
    "offset": "<u8",  # of the image's bytes in its shard
    "size": "<u4",  # of the image, in bytes
    "crc32": "<u4",  # of the image's bytes: a flipped bit need not stop an image from decoding
    "label": "<i4",  # index into the classes, -1 where there is none
    "split": "|u1",  # index into SPLITS
    "suffix": "|u1",  # index into the manifest's suffixes
    "key": "S",  # as wide as the longest key
}


class Shard(BaseModel):
    """One tar of a set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="file name beside the manifest", pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,199}\.tar$")
    size: int = Field(description="bytes", ge=0)
    sha256: str = Field(description="hash of the file", pattern=r"^[0-9a-f]{64}$")
    samples: int = Field(description="number of samples", ge=1)


class Column(BaseModel):
    """One file of `samples/`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(description="bytes", ge=0)
    sha256: str = Field(description="hash of the file", pattern=r"^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """What `manifest.json` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = Field(default=SCHEMA_VERSION, description="version of this layout")
    name: str = Field(description="name of the set, such as quickdraw/source")
    image_shape: tuple[int, int, int] = Field(description="(C, H, W) of every image")
    value_range: tuple[int, int] = Field(default=(0, 255), description="smallest and largest value a pixel may have")
    classes: tuple[str, ...] = Field(description="class names; a label is an index into them")
    licence: str = Field(description="licence of the images")
    source: str = Field(description="where the images came from")
    splits: dict[str, int] = Field(description="samples in each split, train and reference")
    suffixes: tuple[str, ...] = Field(default=("png",), description="file suffixes of the images in the tars", min_length=1)
    packing: dict[str, Any] = Field(default={}, description="how the images were made: seed, size policy, encoding")
    provenance: dict[str, Any] = Field(default={}, description="of generated images: checkpoint, its hash, seed, truncation")
    bad: tuple[tuple[str, str], ...] = Field(default=(), description="files that were left out, with the reason")
    duplicates: int = Field(default=0, description="exact copies that were left out; duplicates.csv lists them", ge=0)
    shards: tuple[Shard, ...] = Field(description="the tars, in the order of the samples", min_length=1)
    columns: dict[str, Column] = Field(default={}, description="the files of samples/, by column")
    sha256: str = Field(default="", description="hash of all the fields above: the identity of the set")

    def content_hash(self) -> str:
        """sha256 of the manifest without its own hash; it covers every shard and column through their hashes."""
        content = self.model_dump(mode="json", exclude={"sha256"})
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class ShardSet:
    """An opened set: where it lies and its manifest. Columns of the samples are mapped into memory on first use."""

    store: Store
    manifest: Manifest

    @property
    def place(self) -> str:
        """The set's folder as a path or URL."""
        return self.store.name

    @property
    def path(self) -> Path:
        """The set's folder on this machine; raises `UserError` if it lies elsewhere."""
        if self.store.local is None:
            raise UserError(f"set {self.place} does not lie on this machine; copy it to a folder first")
        return self.store.local

    @cached_property
    def samples(self) -> Mapping[str, np.ndarray]:
        """Column name (see `COLUMNS`) -> read-only array (N,), checked against its hash when it is first asked for."""
        return _Columns(self.store, self.manifest)

    @cached_property
    def bounds(self) -> np.ndarray:
        """int64 (shards + 1,): shard s holds the sample ids bounds[s] to bounds[s + 1]."""
        return np.cumsum([0, *(shard.samples for shard in self.manifest.shards)])

    def __len__(self) -> int:
        return sum(self.manifest.splits.values())

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be pickled as a full copy into every loader process.
        return {"store": self.store, "manifest": self.manifest}

    def indices(self, split: str = "train", label: int | str | None = None) -> np.ndarray:
        """Returns the sample ids of a split, int64 ascending, optionally of one class (index or name).

        Raises `UserError` for an unknown split or class, naming those there are.
        """
        if split not in SPLITS:
            raise UserError(f"split {split!r} does not exist; a set has the splits {', '.join(SPLITS)}")
        if label is None and self.manifest.splits[split] == len(self):
            return np.arange(len(self))
        chosen = self.samples["split"] == SPLITS.index(split)
        if label is not None:
            chosen &= self.samples["label"] == self.label_index(label)
        return np.flatnonzero(chosen)

    def shards_of(self, ids: np.ndarray) -> np.ndarray:
        """The number of the shard that holds each sample id."""
        return np.searchsorted(self.bounds, ids, side="right") - 1

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


class _Columns(Mapping[str, np.ndarray]):
    """The files of `samples/`, each opened and checked once, when it is first asked for."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.store, self.manifest = store, manifest
        self.loaded: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.loaded:
            if name not in COLUMNS:
                raise KeyError(name)
            self.loaded[name] = self._load(name)
        return self.loaded[name]

    def __iter__(self) -> Any:
        return iter(COLUMNS)

    def __len__(self) -> int:
        return len(COLUMNS)

    def _load(self, name: str) -> np.ndarray:
        manifest, column, file = self.manifest, self.manifest.columns[name], f"{SAMPLES}/{name}.npy"
        path = cached_file(self.store, file, column.sha256, column.size)
        try:
            rows: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{self.store.where(file)} cannot be read ({error}); {_remedy(self.store)}") from None
        kind = rows.dtype.kind == "S" if name == "key" else rows.dtype.str == COLUMNS[name]
        if not kind or rows.shape != (sum(shard.samples for shard in manifest.shards),) or not _sound(name, rows, manifest):
            raise UserError(f"{self.store.where(file)} and its manifest do not agree; {_remedy(self.store)}")
        return rows


def _sound(name: str, rows: np.ndarray, manifest: Manifest) -> bool:
    """The hashes say that the files are the written ones; this says that they are consistent, whoever wrote them.

    What offsets and sizes point at is checked when it is read.
    """
    if name == "label":
        return bool(rows.min() >= -1 and rows.max() < len(manifest.classes))
    if name == "split":
        found = np.bincount(rows, minlength=len(SPLITS))
        return len(found) == len(SPLITS) and manifest.splits == dict(zip(SPLITS, found.tolist(), strict=True))
    if name == "suffix":
        return bool(rows.max() < len(manifest.suffixes))
    if name == "size":
        return bool(rows.max() <= MAX_BYTES)
    return True


def open_set(place: str | os.PathLike[str]) -> ShardSet:
    """Opens the set at `place`, a folder or a URL (`stores.open_store`), and checks what is cheap to check: the manifest's
    own hash and, on this machine, that every shard and column is there in its size. Columns are hashed when they are
    first used, shards by `verify`.

    Raises `UserError` naming the remedy if the folder or its manifest is missing or does not hold together, and
    `DamagedShard` naming the shard.
    """
    store = open_store(place)
    if store.local is not None and not store.local.is_dir():
        raise UserError(
            f"there is no folder of shards at {place}; run `graft shards fetch NAME` or `graft shards pack SRC --out"
            f" {place}`"
        )
    if not store.exists(MANIFEST):
        raise UserError(f"{place} holds no {MANIFEST}; run `graft shards index {place}` to make one for its tars")
    manifest = _read_manifest(store)
    if store.local is not None:
        _check_sizes(store.local, manifest)
    return ShardSet(store, manifest)


def _check_sizes(folder: Path, manifest: Manifest) -> None:
    for name, column in manifest.columns.items():
        file = folder / SAMPLES / f"{name}.npy"
        if not file.is_file() or file.stat().st_size != column.size:
            raise UserError(
                f"{file} is missing or not the file its manifest describes; run `graft shards index {folder}`, or fetch"
                " or pack the set again"
            )
    for shard in manifest.shards:
        size = file_size(folder / shard.name)
        if size != shard.size:
            reason = f"it has {size} bytes where the manifest says {shard.size}"
            raise damaged(folder / shard.name, min(size, shard.size), reason)


def info(shard_set: ShardSet) -> dict[str, Any]:
    """Returns what a person asks of a set: name, shape, classes, licence, counts, bytes, hash; JSON-ready."""
    manifest = shard_set.manifest
    data = manifest.model_dump(mode="json", exclude={"shards", "columns", "classes"})
    labels = np.bincount(shard_set.samples["label"] + 1, minlength=1 + len(manifest.classes))
    return {
        **data,
        "place": shard_set.place,
        "samples": len(shard_set),
        "shards": len(manifest.shards),
        "bytes": sum(shard.size for shard in manifest.shards),
        "classes": dict(zip(manifest.classes, labels[1:].tolist(), strict=True)),
        "unlabelled": int(labels[0]),
    }


def verify(shard_set: ShardSet, progress: Callable[[int, int], None] | None = None) -> None:
    """Hashes every shard and column anew; `progress(done, total)` is called after each shard.

    Raises `DamagedShard` naming the first shard whose bytes are not those of the manifest.
    """
    store, shards = shard_set.store, shard_set.manifest.shards
    for number, shard in enumerate(shards):
        if _hash(store, shard) != shard.sha256:
            raise DamagedShard(
                f"shard {store.where(shard.name)} does not have the sha256 of its manifest; fetch or pack the set again"
            )
        if progress:
            progress(number + 1, len(shards))
    fresh = ShardSet(store, shard_set.manifest)
    for name in COLUMNS:
        fresh.samples[name]


def _hash(store: Store, shard: Shard) -> str:
    if store.local is not None:
        file_size(store.local / shard.name)  # a pipe in its place would be read for ever
        return hash_file(store.local / shard.name)
    digest = hashlib.sha256()
    for data in store.parts(shard.name, shard.size + 1):  # a byte more than there should be, to see that there is none
        digest.update(data)
    return digest.hexdigest()


def write_set(folder: Path, manifest: Manifest, rows: Mapping[str, np.ndarray]) -> Manifest:
    """Writes the columns (all of `COLUMNS`) and then, last, `manifest.json` with the hashes filled in; returns it."""
    columns = {}
    (folder / SAMPLES).mkdir(exist_ok=True)
    for name, kind in COLUMNS.items():
        path = folder / SAMPLES / f"{name}.npy"
        temporary = path.with_name(f".{name}.partial")
        with temporary.open("wb") as file:
            np.save(file, np.asarray(rows[name], None if name == "key" else kind), allow_pickle=False)
        sync(temporary)
        columns[name] = Column(size=temporary.stat().st_size, sha256=hash_file(temporary))
        temporary.replace(path)
    sync(folder / SAMPLES)
    manifest = manifest.model_copy(update={"columns": columns})
    manifest = manifest.model_copy(update={"sha256": manifest.content_hash()})
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    return manifest


def put_set(folder: Path, store: Store) -> None:
    """Copies what `write_set` wrote to `folder` into `store`, the manifest last: a set is there when its manifest is."""
    for name in COLUMNS:
        store.put(folder / SAMPLES / f"{name}.npy", f"{SAMPLES}/{name}.npy")
    store.put(folder / MANIFEST, MANIFEST)


def as_columns(rows: Sequence[tuple[Any, ...]]) -> dict[str, np.ndarray]:
    """Rows of values in the order of `COLUMNS` -> one array per column."""
    values = list(zip(*rows, strict=True))
    return {name: np.array(column, None if name == "key" else COLUMNS[name])
            for name, column in zip(COLUMNS, values, strict=True)}


def _remedy(store: Store) -> str:
    return f"run `graft shards index {store.name}`, or fetch or pack the set again"


def _read_manifest(store: Store) -> Manifest:
    where, remedy = store.where(MANIFEST), _remedy(store)
    try:
        data = json.loads(store.read(MANIFEST, cap=MAX_MANIFEST_BYTES))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where} is not JSON ({error}); {remedy}") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise UserError(f"{where} has schema version {version}, and this graft reads up to {SCHEMA_VERSION}; update graft")
    if isinstance(version, int) and version < SCHEMA_VERSION:
        raise UserError(f"{where} has schema version {version}, which this graft no longer reads; {remedy}")
    try:
        manifest = Manifest.model_validate(data)
        check_shape(manifest.image_shape)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{where} is no manifest: {where or 'it'}: {first['msg']}; {remedy}") from None
    if manifest.sha256 != manifest.content_hash():
        raise UserError(f"{where} was changed after it was written, its hash does not hold; {remedy}")
    sound = (
        manifest.columns.keys() == COLUMNS.keys()
        and manifest.splits.keys() == set(SPLITS)
        and len({shard.name for shard in manifest.shards}) == len(manifest.shards)
        and sum(manifest.splits.values()) == sum(shard.samples for shard in manifest.shards)
    )
    if not sound:
        raise UserError(f"{where} does not hold together (columns, splits or shards); {remedy}")
    return manifest
