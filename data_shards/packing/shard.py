"""One shard: read, fitted, encoded and written by one process, with a record of what is in it."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from data_shards.errors import BadImage, UserError
from data_shards.images import ENCODINGS, as_picture, encode, fit, open_image
from data_shards.packing.copies import hashes64, thumbnail
from data_shards.packing.place import Place, save
from data_shards.packing.plan import NO_NEAR, Options, Task
from data_shards.packing.record import Record
from data_shards.packing.workers import Tick
from data_shards.tarfiles import BLOCK, RECORD, header

MAX_KEY = 80  # characters of a key that is made of a name
TICK = 32  # images between two reports of progress

_NOT_WORD = re.compile(r"[^A-Za-z0-9_]+")


@dataclass(frozen=True)
class Done:
    """What making a shard tells whoever asked for it."""

    number: int
    images: int  # good and bad ones
    size: int  # bytes
    record: Record


def make_shard(
    options: Options, place: Place, max_bad: int, task: Task, tick: Tick | None = None
) -> Done:
    """Makes the shard of `task`, puts it and its record into `place`, and says what was left out.

    A shard whose images are all bad is only a record. Stops early at more than `max_bad` bad images. `tick(n, b)` is called
    after every few images. Raises `UserError` for what is wrong beyond a single image.
    """
    report = tick or _silent
    with tempfile.TemporaryDirectory(dir=place.workplace(), prefix="shard-") as folder:
        temporary = Path(folder) / "shard.tar"
        with temporary.open("wb", buffering=1 << 20) as file:
            writer = TarFile(file)
            record = _write(options, task, max_bad, writer, report)
            writer.end()
            file.flush()
            os.fsync(file.fileno())
        if len(record.bad) <= max_bad:  # else the pack fails, and this shard is not finished
            record = record.in_tar(f"shard-{task.number:06d}.tar" if record.rows else "", writer)
            save(place, task.number, record, temporary if record.rows else None)
    return Done(task.number, len(task.indices), writer.size, record)


class TarFile:
    """Writes a tar as `webdataset.TarWriter` does, byte for byte, and knows its sha256 and size."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash, self.size = file, hashlib.sha256(), 0

    def add(self, name: str, data: bytes) -> int:
        """Appends a member; returns the byte where its data begins."""
        self.write(b"".join((header(name, len(data)), data, bytes(-len(data) % BLOCK))))
        return self.size - len(data) - -len(data) % BLOCK

    def end(self) -> None:
        """Appends the two empty blocks that end a tar, and fills up its last record."""
        self.write(bytes(2 * BLOCK + -(self.size + 2 * BLOCK) % RECORD))

    def write(self, data: bytes) -> None:
        self.hash.update(data)
        self.size += len(data)
        self.file.write(data)


def _write(options: Options, task: Task, max_bad: int, tar: TarFile, report: Tick) -> Record:
    suffix = ENCODINGS[options.encoding]
    rows: list[tuple[Any, ...]] = []
    bad: list[tuple[str, str]] = []
    hashes: list[bytes] = []
    thumbnails: list[bytes] = []
    names, told = task.part.names, (0, 0)
    labels, splits, indices = task.labels.tolist(), task.splits.tolist(), task.indices.tolist()
    try:
        for number, index in enumerate(indices):
            try:
                image, label = _image(options, task.part.read(number), labels[number])
                data = encode(image, options.encoding, options.quality)
            except (BadImage, MemoryError) as error:
                bad.append((_shown(names[number]), str(error) or "it needs more memory than there is"))
                if len(bad) > max_bad:
                    break
                continue
            if not -1 <= label < task.classes:
                raise UserError(f"{names[number]} has the label {label}, and the set has {task.classes} classes; correct it")
            key = task.keys[number] if task.keys else _key(index, names[number])
            if label >= 0:
                tar.add(f"{key}.cls", str(label).encode())
            offset = tar.add(f"{key}.{suffix}", data)
            rows.append((offset, len(data), zlib.crc32(data), label, splits[number], 0, key.encode(), index))
            hashes.append(hashlib.sha256(data).digest()[:16])
            if options.near != NO_NEAR:
                thumbnails.append(thumbnail(image))
            if number % TICK == TICK - 1:
                report(number + 1 - told[0], tar.size - told[1])
                told = number + 1, tar.size
    finally:
        task.part.close()
    report(len(indices) - told[0], tar.size - told[1])
    return Record.of(rows, hashes, hashes64(thumbnails, len(rows)), tuple(bad))


def _image(options: Options, content: Any, label: int) -> tuple[Image.Image, int]:
    """The picture to encode, and its label, which the content may bring along."""
    if isinstance(content, tuple):
        content, label = content
    if isinstance(content, np.ndarray):
        if content.shape != options.shape:
            raise BadImage(f"its shape is {content.shape}, not {options.shape}")
        return as_picture(content), int(label)
    image = open_image(content) if isinstance(content, bytes) else content
    return fit(image, options.shape[1:], options.shape[0], background=options.background), label


def _key(index: int, name: str) -> str:
    """The item's number and what its name says, as a key that any file system and tar takes."""
    stem = name.rpartition(".")[0] or name
    return f"{index:08d}-{_NOT_WORD.sub('-', stem).strip('-')}"[:MAX_KEY].rstrip("-")


def _shown(name: str) -> str:
    """A name that JSON and UTF-8 can hold."""
    return name.encode("utf-8", "replace").decode()


def _silent(_images: int, _size: int) -> None:
    return None
