"""A real S3 server process, the same as for the tests of stores, and one that refuses when it is told to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from data_shards.stores import objects
from tests.data_shards.conftest import fast_retries, s3, s3_address
from tests.data_shards.servers import RefusingProxy

__all__ = ["fast_retries", "refusing_s3", "s3", "s3_address"]


@pytest.fixture
def refusing_s3(s3: str, s3_address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, RefusingProxy]]:
    """A bucket's address, and the proxy through which it is reached."""
    proxy = RefusingProxy(s3_address)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setattr(objects, "_systems", {})
    yield s3, proxy
    proxy.close()
