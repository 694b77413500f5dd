"""A strict reader of uncompressed tar headers, for tars that are not trusted, and a writer of plain ones.

The standard library's reader skips what it cannot parse and follows negative sizes; webdataset drops samples behind a
damaged header without a word. This one knows plain files only and raises on everything else.
"""

from __future__ import annotations

import os
import re
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data_shards.errors import DamagedShard, UserError

BLOCK = 512
RECORD = 20 * BLOCK  # a tar's length is a multiple of it
MAX_KEY = 200
MAX_NAME = 4096  # bytes, of a member's name in an extra header
_ZERO = bytes(BLOCK)
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_KINDS = {
    "1": "a hard link",
    "2": "a symbolic link",
    "3": "a device",
    "4": "a device",
    "6": "a pipe",
    "L": "a long name",
}


@dataclass(frozen=True)
class Member:
    """A plain file in a tar: its name, the byte where its data begins, and its length in bytes."""

    name: str
    offset: int
    size: int


def local_path(value: str | os.PathLike[str]) -> Path:
    """Returns a plain local path; anything that looks like a URL or a command (`pipe:`, `http:`) is a `UserError`."""
    text = os.fspath(value)
    if not text or "\0" in text:
        raise UserError(f"{text!r} is not a path; give a folder on this machine")
    if _SCHEME.match(text):
        raise UserError(f"{text!r} is not a path on this machine; URLs and commands are not read, give a plain path")
    return Path(text)


def check_key(key: str, where: str) -> str:
    """Returns a sample key if it is safe as a relative file name; raises `UserError` naming `where` otherwise."""
    if len(key) > MAX_KEY or not _KEY.fullmatch(key):
        raise UserError(
            f"{where} holds the sample key {key[:80]!r}; keys are relative names of at most {MAX_KEY} characters from"
            " A-Z a-z 0-9 . _ - and /, so rename it and pack the set again"
        )
    return key


def parse_header(block: bytes) -> tuple[str, int, str]:
    """Returns (name, size in bytes, type flag) of a 512-byte ustar header.

    Raises `ValueError` if the checksum does not hold or a field is not what ustar allows.
    """
    if len(block) != BLOCK:
        raise ValueError("the tar header is cut short")
    # The checksum counts its own eight bytes as blanks.
    if sum(block) - sum(block[148:156]) + 8 * 32 != _octal(block[148:156]):
        raise ValueError("the tar header's checksum does not hold")
    size = _octal(block[124:136])
    try:
        name = block[:100].split(b"\0", 1)[0].decode("utf-8")
        prefix = block[345:500].split(b"\0", 1)[0].decode("utf-8") if block[257:263] == b"ustar\0" else ""
    except UnicodeDecodeError:
        raise ValueError("the member's name is not UTF-8") from None
    flag = chr(block[156]) if block[156] else "0"
    return (f"{prefix}/{name}" if prefix else name), size, flag


def header(name: str, size: int) -> bytes:
    """The 512-byte ustar header of a plain file; name of at most 100 ASCII characters, size in bytes.

    Byte for byte what `webdataset.TarWriter` writes with mtime 0, at a tenth of its time.
    """
    encoded, octal = name.encode("ascii"), b"%011o" % size
    assert len(encoded) <= 100 and len(octal) == 11
    checksum = _BLANK_SUM + sum(encoded) + sum(octal)
    return b"".join((encoded.ljust(100, b"\0"), _BLANK[100:124], octal, _BLANK[135:148], b"%06o\0 " % checksum, _BLANK[156:]))


def _blank_header() -> bytes:
    info = tarfile.TarInfo("")
    info.mode, info.uname, info.gname = 0o444, "bigdata", "bigdata"
    return info.tobuf(tarfile.USTAR_FORMAT)


_BLANK = _blank_header()
_BLANK_SUM = sum(_BLANK) - sum(_BLANK[148:156]) - 11 * ord("0") + 8 * ord(" ")


def members(path: Path, *, what: str = "shard", long_names: bool = False) -> Iterator[Member]:
    """Walks the plain files of an uncompressed tar in order.

    `what` is the word for it in messages. `long_names` lets names of over 100 bytes pass, as GNU and pax tars write them
    in an extra header. Raises `DamagedShard` naming the tar and the byte if a header is damaged or the archive is cut
    short, and `UserError` if it holds a link, a device, or a name too long for ustar. Folders are passed over.
    """
    total = file_size(path)
    longer: str | None = None
    with path.open("rb") as file:
        offset = 0
        while True:
            block = file.read(BLOCK)
            if block == _ZERO:
                return _expect_zeros(file, path, offset)
            try:
                name, size, flag = parse_header(block)
            except ValueError as error:
                raise damaged(path, offset, str(error)) from None
            if offset + BLOCK + size > total:
                raise damaged(path, offset, f"member {name[:80]!r} of {size} bytes reaches past the end of the file")
            if flag == "0":
                yield Member(name if longer is None else longer, offset + BLOCK, size)
                longer = None
            elif flag in "xg":
                found = _check_extension(file.read(min(size, 1 << 20)), path, offset, long_names and flag == "x", what)
                longer = longer if found is None else found
            elif flag == "L" and long_names:
                longer = _long_name(file.read(min(size, MAX_NAME + 1)), path, offset)
            elif flag != "5":
                kind = _KINDS.get(flag, f"of type {flag!r}")
                raise UserError(f"{what} {path}: member {name[:80]!r} is {kind}; {what}s hold plain files, pack it again")
            else:
                longer = None
            offset += BLOCK + -(-size // BLOCK) * BLOCK
            file.seek(offset)


def file_size(path: Path) -> int:
    """Returns the size in bytes of a regular file; a missing one, a pipe or a device is a `DamagedShard`."""
    try:
        status = path.stat()
    except OSError as error:
        raise DamagedShard(f"shard {path} cannot be read ({error.strerror}); fetch or pack the set again") from None
    if not stat.S_ISREG(status.st_mode):
        raise DamagedShard(f"shard {path} is not a regular file; fetch or pack the set again")
    return status.st_size


def damaged(path: Path, offset: int, reason: str) -> DamagedShard:
    """The error for bytes of a shard that are not what they should be."""
    return DamagedShard(f"shard {path} is damaged at byte {offset}: {reason}; fetch or pack the set again")


def _octal(field: bytes) -> int:
    text = field.rstrip(b"\0 ").lstrip(b" ")
    if not text or any(byte not in b"01234567" for byte in text):
        raise ValueError(f"the tar header holds the number {bytes(field)!r}")  # negative and base-256 ones included
    return int(text, 8)


def _check_extension(records: bytes, path: Path, offset: int, long_names: bool, what: str) -> str | None:
    """Lets pass the pax records that do not change what a member is (times, owners); returns its name if one sets it."""
    name = None
    while records:
        length, _, _ = records.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(records):
            raise damaged(path, offset, "a pax header is malformed")
        key, _, value = records[len(length) + 1 : int(length)].partition(b"=")
        word = key.decode("utf-8", "replace")
        if word == "path" and long_names:
            name = _long_name(value.removesuffix(b"\n"), path, offset)
        elif word in ("path", "size", "linkpath") or word.startswith("GNU.sparse"):
            raise UserError(
                f"{what} {path}: a pax header at byte {offset} sets {word!r}; write the tar in the ustar format with"
                " names of at most 100 bytes"
            )
        records = records[int(length) :]
    return name


def _long_name(value: bytes, path: Path, offset: int) -> str:
    try:
        name = value.rstrip(b"\0").decode("utf-8")
    except UnicodeDecodeError:
        raise damaged(path, offset, "the member's name is not UTF-8") from None
    if not name or len(value) > MAX_NAME:
        raise damaged(path, offset, f"a member's name is empty or over {MAX_NAME} bytes")
    return name


def _expect_zeros(file: BinaryIO, path: Path, offset: int) -> None:
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            raise damaged(path, offset, "an empty header stands before the end of the archive")
