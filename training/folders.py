"""Where a run lies: a folder (a `Path`), or a prefix in an object store (its URL as text)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TypeVar, cast

from data_shards.errors import UserError
from data_shards.files import write_bytes
from data_shards.stores import Store, open_store
from data_shards.stores.places import parse_place

Folder = Path | str
FolderT = TypeVar("FolderT", bound=Path | str)

PATIENCE_S = 150.0  # a store that refuses for shorter is waited for


def run_folder(text: str) -> Folder:
    """A run's folder as the user named it: an absolute path, or the URL of an object store.

    Raises:
        UserError: for an address that cannot be written to.
    """
    if not text.strip():
        raise UserError("--out is empty; give a folder, or leave it out for runs/<recipe name>.")
    if "://" not in text:
        return Path(text).resolve()
    place = parse_place(text)
    if place.local is not None:
        return place.local.resolve()
    if place.scheme in ("http", "https"):
        raise UserError(f"--out {text} cannot be written to; give a folder, or an object store such as s3://bucket/run.")
    open_store(text)  # refuses where its package is missing
    return place.name


def inside(folder: FolderT, name: str) -> FolderT:
    """The entry ``name`` of ``folder``."""
    return cast(FolderT, folder / name if isinstance(folder, Path) else f"{folder}/{name}")


def base_name(folder: Folder) -> str:
    return folder.name if isinstance(folder, Path) else folder.rpartition("/")[2]


def store_of(folder: str) -> Store:
    """The store at a URL, with the patience that a run's own folder deserves."""
    return open_store(folder, patience_s=PATIENCE_S)


def read_file(folder: Folder, name: str) -> bytes:
    """The whole file.

    Raises:
        FileNotFoundError: when it is not there.
        UserError: when a store cannot be asked.
    """
    if isinstance(folder, Path):
        return (folder / name).read_bytes()
    store = store_of(folder)
    if not store.exists(name):
        raise FileNotFoundError(2, "missing", name)
    return b"".join(store.parts(name, store.size(name)))


def write_file(folder: Folder, name: str, data: bytes) -> None:
    """Replace the file in one step."""
    if isinstance(folder, Path):
        write_bytes(folder / name, data)
    else:
        store_of(folder).write(name, data)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary names that killed writers left in ``folder``."""
    for path in folder.glob(".*.partial"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
