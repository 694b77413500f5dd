"""Object stores, as far as packing needs them."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from data_shards.errors import UserError


class Store(Protocol):
    """A place for the files of one set, by name."""

    def read(self, name: str, start: int, end: int) -> bytes: ...
    def put(self, file: Path, name: str) -> None: ...
    def write(self, name: str, data: bytes) -> None: ...
    def exists(self, name: str) -> bool: ...
    def names(self) -> Iterable[str]: ...
    def remove(self, name: str) -> None: ...


def open_store(url: str) -> Store:
    """The store at a URL; raises `UserError` where URLs cannot be written."""
    try:
        stores: Any = importlib.import_module("data_shards.stores")
    except ModuleNotFoundError:
        raise UserError(f"{url} is a URL, and this graft writes sets to plain paths only; give a folder") from None
    found: Store = stores.open_store(url)
    return found
