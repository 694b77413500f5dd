"""A manifest for WebDataset tars that others wrote; the tars stay as they are."""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from data_shards.errors import BadImage, UserError
from data_shards.files import hash_file
from data_shards.images import MAX_BYTES, SUFFIXES, decode_image
from data_shards.manifest import (
    MANIFEST,
    Manifest,
    Shard,
    ShardSet,
    as_columns,
    open_set,
    put_set,
    write_set,
)
from data_shards.stores import Store, open_store
from data_shards.tarfiles import Member, check_key, damaged, file_size, members

MAX_LABEL_BYTES = 64 * 1024
MAX_CLASSES = 100_000


def index_tars(
    place: str | os.PathLike[str],
    *,
    channels: int = 3,
    name: str | None = None,
    licence: str = "unknown",
    source: str = "unknown",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ShardSet:
    """Makes `manifest.json` and `samples/` for the plain `*.tar` files at `place`, a folder or an object store's URL, all
    in the split "train".

    A sample is one image (.png .jpg .jpeg .webp) and at most one label: an integer in `.cls`, or "label" (integer or
    name) in `.json`. Every image is decoded once, and all must have one size. `progress(done, total)` counts shards.

    Raises `UserError` for a missing folder, no tar, an existing manifest (without `overwrite`), any other member,
    unsafe or duplicate keys, links, unlike image sizes; `DamagedShard` for damaged or cut tars.
    """
    store = open_store(place)
    root = store.name
    if store.local is not None and not store.local.is_dir():
        raise UserError(f"there is no folder {root}; give the folder that holds the tars")
    listed = [file for file in store.names() if file.endswith(".tar") and "/" not in file]
    if not listed:
        raise UserError(f"{root} holds no .tar file; `graft shards pack` makes shards from images")
    if store.exists(MANIFEST) and not overwrite:
        raise UserError(f"{store.where(MANIFEST)} exists already; make it anew with --overwrite")
    shards: list[Shard] = []
    rows: list[list[Any]] = []
    shapes: dict[tuple[int, ...], str] = {}
    for number, file in enumerate(listed):
        with _at_hand(store, file) as path:
            found = _index_tar(path, channels, shapes)
            try:
                shards.append(Shard(name=file, size=file_size(path), sha256=hash_file(path), samples=len(found)))
            except ValueError:
                raise UserError(f"shard {path} has an unsafe name or no sample; rename or remove it") from None
        rows += found
        if progress:
            progress(number + 1, len(listed))
    copies = {shard.sha256: shard.name for shard in shards}
    for shard in shards:
        if copies[shard.sha256] != shard.name:
            raise UserError(f"shards {shard.name} and {copies[shard.sha256]} in {root} are the same; remove one")
    if len(shapes) != 1:
        (first, one), (second, two) = list(shapes.items())[:2]
        raise UserError(f"images in {root} differ in size: {one} is {first}, {two} is {second}; pack them to one size")
    labels, classes = _number_labels([row[3] for row in rows], root)
    suffixes = sorted({row[5] for row in rows})
    table = as_columns(
        [(*row[:3], label, 0, suffixes.index(row[5]), row[6]) for row, label in zip(rows, labels, strict=True)]
    )
    shape = next(iter(shapes))
    manifest = Manifest(
        name=name or (store.local.resolve().name if store.local else root.rpartition("/")[2]),
        image_shape=(shape[0], shape[1], shape[2]),
        classes=classes,
        licence=licence,
        source=source,
        splits={"train": len(rows), "reference": 0},
        suffixes=tuple(suffixes),
        shards=tuple(shards),
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = store.local or Path(scratch)
        write_set(folder, manifest, table)
        if store.local is None:
            put_set(folder, store)
    return open_set(place)


@contextmanager
def _at_hand(store: Store, name: str) -> Iterator[Path]:
    """A shard as a file on this machine, for as long as the block lasts."""
    if store.local is not None:
        yield store.local / name
        return
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / name
        with path.open("wb") as file:
            file.writelines(store.parts(name, store.size(name)))
        yield path


def _index_tar(path: Path, channels: int, shapes: dict[tuple[int, ...], str]) -> list[list[Any]]:
    """Rows of one tar, the label still as found: int, str, or None."""
    groups: dict[str, dict[str, Member]] = {}
    last = None
    for member in members(path):
        head, _, base = member.name.removeprefix("./").rpartition("/")
        stem, _, suffix = base.partition(".")
        key = check_key(f"{head}/{stem}" if head else stem, f"shard {path}")
        if suffix.lower() not in (*SUFFIXES, "cls", "json"):
            raise UserError(
                f"shard {path}: member {member.name[:80]!r} is neither an image ({', '.join(SUFFIXES)}) nor a label"
                " (cls, json); write the tar without it"
            )
        if suffix in groups.get(key, {}) or (key in groups and key != last):
            raise UserError(f"shard {path}: sample {key!r} occurs twice; keys must be unique, so write the tar again")
        groups.setdefault(key, {})[suffix] = member
        last = key
    with path.open("rb") as file:
        return [_row(path, file, key, group, channels, shapes) for key, group in groups.items()]


def _row(
    path: Path,
    file: BinaryIO,
    key: str,
    group: dict[str, Member],
    channels: int,
    shapes: dict[tuple[int, ...], str],
) -> list[Any]:
    images = [suffix for suffix in group if suffix.lower() in SUFFIXES]
    labels = [suffix for suffix in group if suffix not in images]
    if len(images) != 1 or len(labels) > 1:
        raise UserError(
            f"shard {path}: sample {key!r} has {len(images)} images and {len(labels)} labels, not 1 and <= 1"
        )
    image = group[images[0]]
    if image.name != f"{key}.{images[0]}":
        raise UserError(f"shard {path}: member {image.name[:80]!r} begins with ./; write the tar with plain names")
    data = _read(path, file, image, MAX_BYTES)
    try:
        shape = decode_image(data, channels).shape
    except BadImage as error:
        raise damaged(path, image.offset, f"{image.name!r}: {error}") from None
    shapes.setdefault(shape, f"{path.name}:{key}")
    label = _label(path, file, group[labels[0]], labels[0].lower()) if labels else None
    return [image.offset, image.size, zlib.crc32(data), label, 0, images[0], key.encode()]


def _read(path: Path, file: BinaryIO, member: Member, cap: int) -> bytes:
    if member.size > cap:
        raise UserError(f"shard {path}: member {member.name[:80]!r} has {member.size} bytes, over the cap of {cap}")
    file.seek(member.offset)
    return file.read(member.size)


def _label(path: Path, file: BinaryIO, member: Member, suffix: str) -> int | str | None:
    data = _read(path, file, member, MAX_LABEL_BYTES)
    try:
        if suffix == "cls":
            label: Any = int(data) if len(data) < 20 else None
        else:
            content = json.loads(data)
            label = content.get("label", -1) if isinstance(content, dict) else None
    except (ValueError, RecursionError):
        label = None
    if isinstance(label, bool) or not isinstance(label, int | str) or (isinstance(label, int) and label < -1):
        raise UserError(
            f"shard {path}: {member.name[:80]!r} holds no label: an integer >= 0, or a name in JSON, is needed"
        )
    return None if label == -1 else label


def _number_labels(found: list[int | str | None], root: str) -> tuple[list[int], tuple[str, ...]]:
    kinds = {type(label) for label in found if label is not None}
    if len(kinds) > 1:
        raise UserError(f"labels in {root} are partly numbers and partly names; use one kind")
    if kinds == {str}:
        names = sorted({str(label) for label in found if label is not None})
        numbers = {label: index for index, label in enumerate(names)}
        return [-1 if label is None else numbers[str(label)] for label in found], tuple(names)
    labels = [-1 if label is None else int(label) for label in found]
    if max(labels) >= MAX_CLASSES:
        raise UserError(
            f"the label {max(labels)} in {root} is over the cap of {MAX_CLASSES} classes; renumber the labels"
        )
    return labels, tuple(str(index) for index in range(max(labels) + 1))
