"""Sources of images, by kind. A new one is a file with a function that opens it, and a line in `KINDS`."""

from __future__ import annotations

import lzma
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_shards.errors import UserError
from data_shards.manifest import MANIFEST
from data_shards.sources import arrays, folder, tars, zips
from data_shards.sources.base import Source

ARRAY_SUFFIXES = (".npy", ".npz")
PARQUET_SUFFIXES = (".parquet", ".pq")


@dataclass(frozen=True)
class Options:
    """What opening a source may need: the folder for what must be unpacked, and columns where they cannot be told."""

    scratch: Path
    image_column: str | None = None
    label_column: str | None = None


KINDS: dict[str, Callable[[Path, Options], Source]] = {
    "folder": lambda path, _: folder.open_folder(path),
    "zip": lambda path, _: zips.open_zip(path),
    "tar": lambda path, options: tars.open_tar(path, options.scratch, options.image_column),
    "webdataset": lambda path, options: tars.open_webdataset(path, options.scratch, options.image_column),
    "arrays": lambda path, options: arrays.open_arrays(path, options.scratch, options.image_column, options.label_column),
    "parquet": lambda path, options: _open_parquet(path, options),
}
# What a reader of an untrusted file raises where the file is not what it should be.
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, ValueError, SyntaxError, OverflowError,
    RuntimeError,
)  # fmt: skip


def open_source(path: Path, options: Options, kind: str | None = None) -> Source:
    """Opens the source at `path`; its kind is told from its name and, for a folder, what lies in it, or given.

    Raises `UserError` naming the path and the remedy for one that is missing, damaged, hostile, or no source at all.
    """
    kind = kind or detect(path)
    if kind not in KINDS:
        raise UserError(f"kind {kind!r} of source does not exist; choose one of {', '.join(KINDS)}")
    if not path.exists():
        raise UserError(f"there is no folder or file {path}; check the path")
    if path.is_dir() and kind not in ("folder", "webdataset", "parquet"):
        raise UserError(f"{path} is a folder, and a source of kind {kind} is a file; give the file")
    if path.is_file() and kind == "folder":
        raise UserError(f"{path} is not a folder; leave --kind out, or give the folder that holds the images")
    if kind == "webdataset" and (path / MANIFEST).is_file():
        raise UserError(
            f"{path} is a set that was packed already, with its classes and splits; copy it by `graft shards copy`, or pack the"
            " images that it was made of"
        )
    try:
        return KINDS[kind](path, options)
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{path} needs more memory to be read than there is; unpack it yourself and give the folder") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or _one_line(error)}); check it and its permissions") from None
    except _DAMAGE as error:
        raise UserError(f"{path} cannot be read as {kind} ({_one_line(error)}); make it anew") from None


def detect(path: Path) -> str:
    """The kind of source at `path`; raises `UserError` if there is none or it is not told."""
    name = path.name.lower()
    if path.is_dir():
        try:
            names = [entry.name.lower() for entry in os.scandir(path) if not entry.name.startswith(".")]
        except OSError as error:
            raise UserError(f"folder {path} cannot be read ({error.strerror}); check its permissions") from None
        if any(name.endswith(PARQUET_SUFFIXES) for name in names):
            return "parquet"
        return "webdataset" if any(name.endswith(tars.TAR_SUFFIXES) for name in names) else "folder"
    if not path.exists():
        raise UserError(f"there is no folder or file {path}; check the path")
    kinds = {".zip": "zip", **dict.fromkeys(tars.TAR_SUFFIXES, "tar"), **dict.fromkeys(ARRAY_SUFFIXES, "arrays"),
             **dict.fromkeys(PARQUET_SUFFIXES, "parquet")}
    for suffix, kind in kinds.items():
        if name.endswith(suffix) and path.is_file():
            return kind
    raise UserError(f"{path} is not a folder of images, nor a file called {', '.join(kinds)}; give one of these")


def _open_parquet(path: Path, options: Options) -> Source:
    from data_shards.sources import parquet  # pyarrow takes a while to import

    return parquet.open_parquet(path, options.image_column, options.label_column)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
