"""S3, Google, Azure and in-memory stores through fsspec, without its globs, its chains and its caches."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards.errors import UserError
from data_shards.stores import retries
from data_shards.stores.base import Store
from data_shards.stores.places import PACKAGES, check_name
from data_shards.stores.retries import time_limit_s

CONNECT_TIMEOUT_S = 10.0

# One file system per process and scheme: a client's connections and its event loop do not survive a fork. The parent's
# entry is kept in a child, untouched, because closing it there would end the parent's connections.
_systems: dict[tuple[int, str], Any] = {}


def check_package(scheme: str) -> None:
    """Raises `UserError` naming the package to install if `scheme`:// cannot be read without one."""
    package = PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{scheme}:// needs the package {package}, which is not installed; run `pip install {package}`")


@dataclass(frozen=True)
class ObjectStore(Store):
    """A prefix in a bucket. A file appears whole, when its upload is complete."""

    def _read(self, name: str, start: int, end: int | None, cap: int) -> bytes:
        if end is None:
            end = self._size(name)
            if end - start > cap:
                raise UserError(f"{self.where(name)} has {end} bytes, over the cap of {cap}; give the right file")
            if start >= end:
                return b""
        try:
            data: bytes = self._call("cat_file", self._path(name), start=start, end=end, limit_s=time_limit_s(end - start))
        except OSError as error:
            if _is_past_the_end(error):
                return b""
            raise
        # Some servers and proxies ignore ranges.
        if len(data) > end - start:
            raise UserError(f"{self.where(name)} is served without ranges; give a store that serves parts of files")
        return data

    def _size(self, name: str) -> int:
        found = self._call("info", self._path(name))
        if found.get("type") != "file":
            raise FileNotFoundError(name)
        return int(found["size"])

    def _names(self) -> list[str]:
        names: list[str] = []
        for entry in self._list(""):
            base = entry["name"].rstrip("/").rpartition("/")[2]
            if entry["type"] == "file":
                names.append(base)
            elif _is_plain(base):
                inner = (each for each in self._list(base) if each["type"] == "file")
                names += [f"{base}/{each['name'].rpartition('/')[2]}" for each in inner]
        return names

    def _put(self, file: Path, name: str) -> None:
        size = file.stat().st_size
        with self._bucket_needed():
            self._call("put_file", str(file), self._path(name), limit_s=time_limit_s(size))
        if self._size(name) != size:
            raise ConnectionError("the upload is not whole")

    def _write(self, name: str, data: bytes) -> None:
        with self._bucket_needed():
            self._call("pipe_file", self._path(name), data, limit_s=time_limit_s(len(data)))

    def _remove(self, name: str) -> None:
        self._call("rm_file", self._path(name))

    @contextmanager
    def _bucket_needed(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            bucket = "/".join(self.name.split("/")[:3])
            raise UserError(f"there is no {bucket} to write to; make the bucket, or check the address") from None

    def _list(self, folder: str) -> list[dict[str, Any]]:
        path = f"{self.name}/{folder}".rstrip("/")
        try:
            found: list[dict[str, Any]] = self._call("ls", self._system()._strip_protocol(path), detail=True)
        except FileNotFoundError:
            return []
        return found

    def _path(self, name: str) -> str:
        path: str = self._system()._strip_protocol(f"{self.name}/{check_name(name)}")
        return path

    def _system(self) -> Any:
        scheme = self.name.partition(":")[0]
        key = (os.getpid(), scheme)
        return _systems.get(key) or _systems.setdefault(key, _make_system(scheme))

    def _call(self, method: str, *args: Any, limit_s: float = 0.0, **options: Any) -> Any:
        system = self._system()
        if not system.async_impl:
            return getattr(system, method)(*args, **options)
        from fsspec.asyn import sync

        return sync(system.loop, getattr(system, f"_{method}"), *args, timeout=limit_s or time_limit_s(0), **options)

    def _remedy(self) -> str:
        if self.name.startswith("s3:"):
            return (
                "check the address, the credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE or the node's role) and"
                " AWS_ENDPOINT_URL where the store is not Amazon's"
            )
        return "check the address and the credentials"


def _make_system(scheme: str) -> Any:
    import fsspec

    options: dict[str, Any] = {}
    if scheme == "s3":
        options["config_kwargs"] = {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": retries.TIMEOUT_S,
            "max_pool_connections": 32,
            "retries": {"total_max_attempts": 1},  # retries.py does it
            # Stores other than Amazon's refuse the newer checksums.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
    if scheme != "memory":
        options |= {"skip_instance_cache": True, "use_listings_cache": False}
    system = fsspec.filesystem(scheme, **options)
    if scheme == "s3":
        system.retries = 1
    return system


def _is_past_the_end(error: BaseException) -> bool:
    """Whether the store said that a range begins behind the end of the file (HTTP 416)."""
    cause = error.__cause__ or error
    response = getattr(cause, "response", None)
    if isinstance(response, dict):
        return response.get("Error", {}).get("Code") in ("InvalidRange", "416")
    return 416 in (getattr(cause, "code", None), getattr(cause, "status", None), getattr(cause, "status_code", None))


def _is_plain(name: str) -> bool:
    try:
        return "/" not in check_name(name)
    except UserError:
        return False
