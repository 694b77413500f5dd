"""The folder of a set, wherever it lies: this machine, an object store, or a web server.

A set is `manifest.json`, a subfolder `samples/` of columns, and tars. What is read is bytes by name and range; what is
written is whole files. Nothing here knows what the bytes mean.

Access is set up by the operator's environment, never by the address: credentials and AWS_ENDPOINT_URL or
AWS_ENDPOINT_URL_S3 for S3 (the standard ones of each package for the others), SSL_CERT_FILE for a private certificate
authority, and GRAFT_TRUSTED_HOSTS, comma-separated `host` or `host:port`, for web servers in a private network, which
may then be read over http too.
"""

from __future__ import annotations

import os

from data_shards.stores.base import MAX_READ, LocalStore, Store
from data_shards.stores.places import parse_place

__all__ = ["MAX_READ", "LocalStore", "Store", "open_store"]


def open_store(place: str | os.PathLike[str], *, patience_s: float = 0.0) -> Store:
    """Returns the folder at `place`; nothing is read yet, so that a missing folder shows at the first read.

    A store that refuses is asked again at least for `patience_s` seconds.

    `place` is a local path, `file:///path`, `https://host/path`, `s3://bucket/path`, `gs://`, `az://`, `abfs://`, or
    `memory://` for tests. Raises `UserError` for every other address (`places.parse_place`), and for an object store
    whose package is not installed.
    """
    parsed = parse_place(place)
    if parsed.local is not None:
        return LocalStore(parsed.name, parsed.local, patience_s)
    if parsed.scheme in ("http", "https"):
        from data_shards.stores.web import WebStore

        return WebStore(parsed.name, patience_s=patience_s)
    from data_shards.stores.objects import ObjectStore, check_package

    check_package(parsed.scheme)
    return ObjectStore(parsed.name, patience_s=patience_s)
