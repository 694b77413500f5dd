"""Images to a set: plain WebDataset tars with reproducible bytes, and the manifest last.

Samples are written in a seeded random order, so that reading a shard in sequence is already mixed. Everything is made
in a sibling folder and renamed into place at the end: a set is there whole or not at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import webdataset as wds

from data_shards.errors import BadImage, UserError
from data_shards.files import sync
from data_shards.images import check_shape, encode_png
from data_shards.manifest import (
    MANIFEST,
    SPLITS,
    Manifest,
    Shard,
    ShardSet,
    as_columns,
    open_set,
    write_set,
)
from data_shards.tarfiles import BLOCK, check_key, local_path

SHARD_SAMPLES = 4096
SHARD_BYTES = 256 * 1024 * 1024

Progress = Callable[[int, int], None]
MapFn = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


class Sample(NamedTuple):
    """One image to pack. `image` is uint8 (C, H, W), or a function that makes it when its turn comes."""

    key: str
    image: np.ndarray | Callable[[], np.ndarray]
    label: int = -1
    split: str = "train"
    origin: str = ""  # what to call it if it turns out bad; the key if empty


def pack_images(
    samples: Iterable[Sample],
    out: str | os.PathLike[str],
    *,
    name: str,
    shape: tuple[int, int, int],
    classes: Sequence[str] = (),
    shard_samples: int = SHARD_SAMPLES,
    shard_bytes: int = SHARD_BYTES,
    licence: str = "unknown",
    source: str = "unknown",
    seed: int = 0,
    max_bad: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
    map_fn: MapFn = map,
) -> ShardSet:
    """Packs samples into the set `out`: `<key>.png`, and `<key>.cls` where there is a label, in shards of at most
    `shard_samples` samples and about `shard_bytes` bytes. The same input and seed give the same bytes.

    An image that cannot be made (`BadImage`) is listed in the manifest with the reason; over `max_bad` are an error.
    `progress(done, total)` counts samples. `map_fn` maps the encoding over samples (a pool's `imap`, or a cluster's).

    Raises `UserError` if `out` exists (without `overwrite`), a key or label is not valid, or nothing is left to pack.
    """
    check_shape(shape)
    if shard_samples < 1 or shard_bytes < 1 or seed < 0:
        raise UserError(f"shard_samples {shard_samples} and shard_bytes {shard_bytes} must be >= 1, seed {seed} >= 0")
    listed = _checked(samples, name, len(classes))
    target = local_path(out)
    with new_folder(target, overwrite) as folder:
        order = np.argsort(np.random.PCG64(np.random.SeedSequence(seed)).random_raw(len(listed)), kind="stable")
        ordered = [listed[index] for index in order]
        bad: list[tuple[str, str]] = []
        encoded = _encoded(ordered, map_fn, partial(_encode, shape), bad, max_bad, progress)
        shards, rows = _write_shards(folder, encoded, shard_samples, shard_bytes)
        if not rows:
            raise UserError(f"no image is left to pack into {target}; the first was left out because {bad[0][1]}")
        table = as_columns(rows)
        manifest = Manifest(
            name=name,
            image_shape=shape,
            classes=tuple(classes),
            licence=licence,
            source=source,
            splits={split: int((table["split"] == index).sum()) for index, split in enumerate(SPLITS)},
            packing={"seed": seed},
            bad=tuple(sorted(bad)),
            shards=tuple(shards),
        )
        write_set(folder, manifest, table)
    return open_set(target)


@contextmanager
def new_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """Gives an empty sibling of `target` to fill, and renames it to `target` if the block ends well.

    Raises `UserError` if `target` is there and `overwrite` is not set or it is no set, if it cannot be written, or if
    another process is filling it.
    """
    if target.exists() or target.is_symlink():
        if not overwrite:
            raise UserError(f"{target} exists already; choose another folder, or overwrite it with --overwrite")
        if not (target / MANIFEST).is_file():
            raise UserError(
                f"{target} is not a set of shards and is not overwritten; remove it or choose another folder"
            )
    draft = target.parent / f".{target.name}.partial"
    try:
        draft.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(draft, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}); choose another folder") from None
    try:
        _lock(descriptor, draft, target)
        for entry in draft.iterdir():  # what a killed process left behind; the lock says that none is writing
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        try:
            yield draft
            _replace_folder(draft, target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, draft: Path, target: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between our open and our lock, another process may have finished and renamed this very folder.
        ours = draft.exists() and os.path.samestat(os.fstat(descriptor), draft.stat())
    except BlockingIOError:
        ours = False
    if not ours:
        raise UserError(f"another process is writing {target}; wait for it or choose another folder")


def _replace_folder(new: Path, target: Path) -> None:
    sync(new)
    old = target.parent / f".{target.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(new, target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _checked(samples: Iterable[Sample], name: str, classes: int) -> list[Sample]:
    listed = list(samples)
    if not listed:
        raise UserError(f"set {name!r} would hold no image; give at least one")
    seen: set[str] = set()
    for sample in listed:
        check_key(sample.key, f"set {name!r}")
        if "." in sample.key.rpartition("/")[2]:
            raise UserError(
                f"the sample key {sample.key!r} holds a dot, where webdataset would cut it; replace the dot"
            )
        if len(sample.key) > 90:
            raise UserError(f"the sample key {sample.key!r} is longer than 90 characters; shorten it")
        if sample.key in seen:
            raise UserError(f"the sample key {sample.key!r} occurs twice in set {name!r}; keys must be unique")
        if not -1 <= sample.label < max(1, classes) or (sample.label >= 0 and not classes):
            raise UserError(
                f"sample {sample.key!r} has the label {sample.label}, but set {name!r} has {classes} classes"
            )
        if sample.split not in SPLITS:
            raise UserError(f"sample {sample.key!r} has the split {sample.split!r}; splits are {', '.join(SPLITS)}")
        seen.add(sample.key)
    return listed


def _encode(shape: tuple[int, int, int], sample: Sample) -> bytes | str:
    """PNG bytes, or the reason why there are none."""
    try:
        image = sample.image() if callable(sample.image) else sample.image
        if image.shape != shape:
            raise BadImage(f"its shape is {image.shape}, not {shape}")
        return encode_png(image)
    except BadImage as error:
        return str(error)


def _encoded(
    ordered: list[Sample],
    map_fn: MapFn,
    encode: Callable[[Sample], bytes | str],
    bad: list[tuple[str, str]],
    max_bad: int,
    progress: Progress | None,
) -> Iterator[tuple[Sample, bytes]]:
    for done, (sample, result) in enumerate(zip(ordered, map_fn(encode, ordered), strict=True), start=1):
        if isinstance(result, bytes):
            yield sample, result
        else:
            bad.append((sample.origin or sample.key, result))
            if len(bad) > max_bad:
                raise UserError(
                    f"{len(bad)} bad image(s), more than the {max_bad} allowed: {bad[-1][0]}: {bad[-1][1]}; remove it,"
                    " or allow more with --max-bad"
                )
        if progress:
            progress(done, len(ordered))


class _HashedFile:
    """A write-only file that knows its sha256 and size."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.size += len(data)
        return self.file.write(data)


def _write_shards(
    folder: Path, encoded: Iterator[tuple[Sample, bytes]], shard_samples: int, shard_bytes: int
) -> tuple[list[Shard], list[tuple[Any, ...]]]:
    """Writes shards until the samples end; returns them and the rows of `samples.npy`."""
    shards: list[Shard] = []
    rows: list[tuple[Any, ...]] = []
    following = next(encoded, None)
    while following is not None:
        name = f"shard-{len(shards):06d}.tar"
        temporary, before = folder / f".{name}.tmp", len(rows)
        with temporary.open("wb") as file:
            stream = _HashedFile(file)
            with wds.TarWriter(stream, encoder=False, mtime=0, compress=False) as writer:
                writer.tarstream.format = tarfile.USTAR_FORMAT  # its default, pax, hides long names in extra members
                while following is not None and len(rows) - before < shard_samples:
                    if len(rows) > before and writer.tarstream.offset >= shard_bytes:
                        break
                    sample, data = following
                    rows.append(_write_sample(writer, sample, data))
                    following = next(encoded, None)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, folder / name)
        shards.append(Shard(name=name, size=stream.size, sha256=stream.hash.hexdigest(), samples=len(rows) - before))
    return shards, rows


def _write_sample(writer: Any, sample: Sample, data: bytes) -> tuple[Any, ...]:
    content: dict[str, Any] = {"__key__": sample.key, "png": data}
    if sample.label >= 0:
        content["cls"] = str(sample.label).encode()
    writer.write(content)
    # Members are written in the order of their suffixes, so the image is the last one.
    offset = writer.tarstream.offset - -(-len(data) // BLOCK) * BLOCK
    return offset, len(data), zlib.crc32(data), sample.label, SPLITS.index(sample.split), 0, sample.key.encode()
