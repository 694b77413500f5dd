"""A zip archive of images, read in place: nothing is extracted."""

from __future__ import annotations

import hashlib
import io
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_shards.errors import BadImage, UserError
from data_shards.images import FORMATS
from data_shards.sources.base import (
    Files,
    Source,
    check_count,
    check_format,
    check_name,
    check_size,
    check_total,
    is_picture,
    pick,
    stamp,
)
from data_shards.sources.labels import LABELS, from_names, without_wrapper

MAX_TABLE = 256 * 1024 * 1024  # bytes of a labels.csv
_LOCAL = struct.Struct("<4s5H3L2H")  # the header before a member's bytes


@dataclass
class ZipPart:
    """Members of a zip: `table` int64 (N, 5) holds header's offset, method, crc32, packed and unpacked size of each."""

    path: str
    names: list[str]
    table: np.ndarray
    opened: Files = field(default_factory=Files)

    def read(self, number: int) -> bytes:
        check_format(self.names[number])
        return read_member(self.opened, self.path, self.table[number])

    def close(self) -> None:
        self.opened.close()


def read_member(files: Files, path: str, row: np.ndarray) -> bytes:
    """A member's bytes, unpacked to the size that the directory states and no further.

    Raises `BadImage` for anything that does not hold.
    """
    offset, method, checksum, packed, size = row.tolist()
    check_size(max(packed, size))
    signature, _, _, _, _, _, _, _, _, name, extra = _LOCAL.unpack(files.read(path, offset, _LOCAL.size))
    if signature != b"PK\3\4":
        raise BadImage("the archive holds no member where its directory says")
    data = files.read(path, offset + _LOCAL.size + name + extra, packed)
    if method == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompressobj(-15).decompress(data, size + 1)
        except zlib.error as error:
            raise BadImage(f"it cannot be unpacked ({error})") from None
    elif method != zipfile.ZIP_STORED:
        raise BadImage(f"it is packed by method {method}; only stored and deflated members are read")
    if len(data) != size or zlib.crc32(data) != checksum:
        raise BadImage("its bytes are not those that the archive's directory describes")
    return data


def open_zip(path: Path) -> Source:
    """Lists the pictures in a zip; the classes are its folders, or stand in a labels.csv inside.

    Raises `UserError` for an archive that is damaged or encrypted, unsafe names, and sizes that only a bomb claims.
    """
    names, table, lists = _directory(path)
    if not names:
        raise UserError(f"{path} holds no image; it should hold {', '.join(FORMATS)} files")
    check_count(len(names), path)
    check_total(int(table[:, 4].sum()), path)
    order = sorted(range(len(names)), key=names.__getitem__)
    names, table = [names[index] for index in order], table[order]
    if repeated := next((name for name, after in pairwise(names) if name == after), None):
        raise UserError(f"{path} holds {repeated!r} twice; make the archive anew")
    head = without_wrapper(names, lists)
    rows = lists.get(f"{head}{LABELS}", lists.get(LABELS))
    labels, classes = from_names([name[len(head) :] for name in names], None if rows is None else _lines(path, rows), str(path))
    digest = hashlib.sha256(f"{stamp(path)} {len(names)}".encode() + labels.tobytes()).hexdigest()

    def part(indices: np.ndarray) -> ZipPart:
        return ZipPart(str(path), pick(names, indices), table[indices])

    return Source("zip", labels, classes, digest, part)


def _directory(path: Path) -> tuple[list[str], np.ndarray, dict[str, np.ndarray]]:
    """(names of the pictures, their rows as in `ZipPart`, rows of the labels.csv files by name)."""
    names: list[str] = []
    lists: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(path) as archive:
        table = np.empty((len(archive.infolist()), 5), np.int64)
        for member in archive.infolist():
            name = check_name(member.filename, path)
            listing = name.rpartition("/")[2] == LABELS
            if member.is_dir() or not (listing or is_picture(name)):
                continue
            if member.flag_bits & 0x41:
                raise UserError(f"{path} is encrypted ({name!r}); unpack it with its password and give the folder")
            if member.external_attr >> 16 & 0o170000 not in (0, 0o100000):
                raise UserError(f"{path} holds {name!r}, which is a link or a device; make the archive anew of plain files")
            row = (member.header_offset, member.compress_type, member.CRC, member.compress_size, member.file_size)
            if listing:
                lists[name] = np.array(row, np.int64)
            else:
                table[len(names)] = row
                names.append(name)
    return names, table[: len(names)].copy(), lists


def _lines(path: Path, row: np.ndarray) -> io.TextIOBase:
    if row[4] > MAX_TABLE:
        raise UserError(f"{LABELS} in {path} has {row[4]} bytes, over the cap of {MAX_TABLE}; unpack the archive yourself")
    files = Files()
    try:
        return io.TextIOWrapper(io.BytesIO(read_member(files, str(path), row)), encoding="utf-8-sig", newline="")
    except BadImage as error:
        raise UserError(f"{LABELS} in {path} cannot be read: {error}") from None
    finally:
        files.close()
