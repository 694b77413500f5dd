from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from data_shards import Sample, ShardSet, pack_images
from data_shards.stores import objects, retries
from tests.conftest import find_free_port
from tests.data_shards.servers import FakeServer, make_certificate, s3_server

MakeSet = Callable[..., ShardSet]


def picture(number: int, channels: int = 1, side: int = 8) -> np.ndarray:
    """An image that no other number has."""
    return np.random.default_rng(number).integers(0, 256, (channels, side, side), dtype=np.uint8)


@pytest.fixture
def make_set(tmp_path: Path) -> MakeSet:
    def make(count: int = 50, name: str = "set", shard_samples: int = 7, classes: int = 5, **options: object) -> ShardSet:
        samples = [Sample(f"k{i:05d}", picture(i), i % classes, "reference" if i % 10 == 9 else "train") for i in range(count)]
        names = [f"class-{i}" for i in range(classes)]
        return pack_images(
            samples,
            tmp_path / name,
            name=name,
            shape=(1, 8, 8),
            classes=names,
            shard_samples=shard_samples,
            **options,  # type: ignore[arg-type]
        )

    return make


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that exists only if something ran that must not."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "untrusted input was executed"


@pytest.fixture
def fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries without waiting."""
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.001)


@pytest.fixture
def web(fast_retries: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """A plain web server that this machine trusts, as a mirror inside a cluster would be."""
    server = FakeServer()
    monkeypatch.setenv("GRAFT_TRUSTED_HOSTS", f"127.0.0.1:{server.port}")
    yield server
    server.close()


@pytest.fixture
def tls_web(fast_retries: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """A web server with TLS whose certificate is trusted and whose address is not."""
    files = make_certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(files[0]))
    server = FakeServer(files)
    yield server
    server.close()


@pytest.fixture(scope="session")
def s3_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    with s3_server(find_free_port(), tmp_path_factory.mktemp("s3")) as address:
        yield address


@pytest.fixture
def s3(s3_address: str, fast_retries: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a bucket at a real S3 server, with the credentials in the environment; returns s3://bucket."""
    use_s3(monkeypatch, s3_address)
    bucket = "set-bucket"
    system = objects._make_system("s3")
    system.call_s3("create_bucket", Bucket=bucket)
    for name in system.find(bucket):
        system.rm_file(name)
    return f"s3://{bucket}"


def use_s3(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Points the S3 client at `address`, whatever this machine has configured."""
    pytest.importorskip("s3fs")
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-of-a-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setattr(objects, "_systems", {})
