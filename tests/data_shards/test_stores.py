"""Stores: every kind reads and writes the same; addresses are text; what fails is retried and then said in a sentence."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from data_shards import UserError
from data_shards.stores import Store, objects, open_store, places, retries
from data_shards.stores import web as web_store
from data_shards.stores.web import is_public
from tests.data_shards.conftest import use_s3
from tests.data_shards.servers import FakeServer

DATA = bytes(range(256)) * 40


@pytest.fixture(params=["local", "file", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Each kind that can be written to."""
    kind = request.param
    if kind == "s3":
        return open_store(request.getfixturevalue("s3") + "/a set")
    base = {"local": str(tmp_path / "set"), "file": f"file://{tmp_path}/set", "memory": f"memory://{tmp_path.name}/set"}
    return open_store(base[kind])


def test_every_kind_reads_what_was_written(store: Store, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(DATA)
    assert store.names() == [] and not store.exists("a.tar")
    store.put(tmp_path / "x", "a.tar")
    store.write("samples/label.npy", b"column")
    store.write("manifest.json", b"")
    store.write("manifest.json", b"{}")
    assert store.names() == ["a.tar", "manifest.json", "samples/label.npy"]
    assert store.exists("a.tar") and not store.exists("samples") and store.size("a.tar") == len(DATA)
    assert store.read("a.tar") == DATA and store.read("manifest.json") == b"{}"
    assert store.read("a.tar", 5, 9) == DATA[5:9] and store.read("a.tar", 7) == DATA[7:]
    assert store.read("a.tar", 10_000, 20_000) == DATA[10_000:]
    assert store.read("a.tar", 50_000, 50_010) == store.read("a.tar", 50_000) == store.read("a.tar", 3, 3) == b""
    assert (store.local is None) == (not store.name.startswith("/"))
    store.remove("a.tar")
    store.remove("a.tar")
    assert not store.exists("a.tar")


def test_what_is_missing_or_too_much_is_said(store: Store) -> None:
    store.write("b.tar", DATA)
    with pytest.raises(UserError, match=r"c\.tar, bytes 5 to 9, cannot be read \(it does not exist\); check"):
        store.read("c.tar", 5, 10)
    for action in (lambda: store.size("c.tar"), lambda: store.read("samples")):
        with pytest.raises(UserError, match=r"cannot be read \(it does not exist\)|not a regular file"):
            action()
    for action in (lambda: store.read("b.tar", cap=99), lambda: store.read("b.tar", 0, 100, cap=99)):
        with pytest.raises(UserError, match="cap"):
            action()
    assert store.read("b.tar", cap=len(DATA)) == DATA
    for span in ((-1, 5), (5, 4)):
        with pytest.raises(UserError, match="are no range"):
            store.read("b.tar", *span)


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "/x", "a/../b", "a//b", "a b", "{0..9}.tar", "x|y", "pipe:x", "a\0", ".x", "a/", "x" * 300]
)
def test_names_are_relative_and_plain(store: Store, name: str) -> None:
    actions = (store.read, store.size, store.exists, store.remove, lambda n: store.write(n, b""))
    for action in (*actions, lambda n: store.put(Path("/dev/null"), n)):
        with pytest.raises(UserError, match="not the name of a file"):
            action(name)


@pytest.mark.parametrize(
    "place",
    [
        "pipe:touch {}",
        "PIPE:touch {}",
        "pipe://touch {}",
        "http://example.com/{}",
        "ftp://example.com/{}",
        "sftp://example.com{}",
        "hf://datasets{}",
        "data:text/plain,{}",
        "ais://b{}",
        "htgs://b{}",
        "local://{}",
        "github://a:b@{}",
        "s3:{}",
        "file:{}",
        "file://host{}",
        "simplecache::s3://b{}",
        "s3://b/x::pipe:touch {}",
        "filecache::http://127.0.0.1{}",
        "x://{}",
        "s3://",
        "s3:///x",
        "https://",
        "https:///x",
        "s3://b/../c",
        "s3://b/./c",
        "s3://b//c",
        "file:///a/../b",
        "https://example.com/a/%2e%2e/b",
        "https://example.com/a/%2E./b",
        "https://example.com/a/%00",
        "https://example.com/{{0..9}}",
        "s3://b/{{a,b}}",
        "s3://b/${{HOME}}",
        "s3://b/$HOME",
        "s3://b/*",
        "s3://b/x?versionId=1",
        "https://example.com/x?token=secret",
        "https://example.com/x#y",
        "https://user:secret@example.com/x",
        "abfs://container@account.dfs.core.windows.net/x",
        "https://example.com\\@127.0.0.1/x",
        "https://exa mple.com/x",
        "https://example.com:99999/x",
        "https://[fe80::1%eth0]/x",
        "s3://b/x\n",
        "s3://b/\x7f",
        "s3://b/\u202e",
        "",
        "a\0b",
        "x/y::pipe:touch {}",
        "/x/s3://b",
    ],
)
def test_other_addresses_are_refused_before_anything_runs(place: str, canary: Path) -> None:
    with pytest.raises(UserError) as caught:
        open_store(place.format(canary))
    message = str(caught.value)
    assert ";" in message and "secret" not in message and "\n" not in message


def test_no_variable_of_the_environment_runs_or_redirects_anything(
    canary: Path, tmp_path: Path, web: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOPEN_REWRITE", "WDS_CACHE", "USE_AIS_FOR", "WDS_SECURE", "WDS_REWRITE", "WDS_SEED"):
        monkeypatch.setenv(name, f"/=pipe:touch {canary};")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    web.files["/a/x.tar"] = DATA
    (tmp_path / "x.tar").write_bytes(DATA)
    for place in (web.url + "/a", tmp_path):
        assert open_store(place).read("x.tar") == DATA


def test_a_local_path_is_literal(tmp_path: Path) -> None:
    folder = tmp_path / "{0..9} $HOME ~ *"
    open_store(folder).write("x.tar", b"1")
    assert (folder / "x.tar").read_bytes() == b"1" and os.listdir(folder) == ["x.tar"]
    assert open_store(f"{folder}/").names() == ["x.tar"]


def test_a_local_pipe_or_device_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.tar")
    store = open_store(tmp_path)
    for action in (store.read, store.size):
        with pytest.raises(UserError, match="not a regular file"):
            action("x.tar")
    assert store.names() == []


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(places.PACKAGES, "gs", "a_package_that_is_not_there")
    with pytest.raises(UserError, match="run `pip install a_package_that_is_not_there`"):
        open_store("gs://bucket/x")


def test_a_web_server_is_read_in_ranges(web: FakeServer) -> None:
    web.files = {"/a/x.tar": DATA, "/a/samples/label.npy": b"", "/a%20b/y.tar": b"y"}
    store = open_store(web.url + "/a/")
    assert store.read("x.tar", 5, 9) == DATA[5:9] and store.read("x.tar", 7) == DATA[7:] and store.read("x.tar") == DATA
    assert store.read("x.tar", 10_200, 99_999) == DATA[10_200:] and store.read("x.tar", 10**6, 10**6 + 1) == b""
    assert store.size("x.tar") == len(DATA) and store.size("samples/label.npy") == 0
    assert store.exists("x.tar") and not store.exists("y.tar")
    assert open_store(web.url + "/a%20b").read("y.tar") == b"y"
    with pytest.raises(UserError, match="over 99 bytes"):
        store.read("x.tar", cap=99)
    with pytest.raises(UserError, match=r"x\.tar, bytes 1 to 2, cannot be read \(it does not exist\)"):
        open_store(web.url).read("x.tar", 1, 3)
    for action in (store.names, lambda: store.write("x", b""), lambda: store.put(Path("x"), "x"), lambda: store.remove("x")):
        with pytest.raises(UserError, match=r"cannot be (listed|written)"):
            action()


def test_a_server_without_ranges_is_read_from_the_start_only(web: FakeServer) -> None:
    web.files, web.ranges = {"/x.tar": DATA * 200}, False
    store = open_store(web.url)
    assert store.read("x.tar", 0, 9) == DATA[:9] and store.size("x.tar") == len(DATA) * 200
    with pytest.raises(UserError, match="does not serve parts"):
        store.read("x.tar", 5, 9)
    web.ranges, web.headers = True, {"Content-Range": "bytes 0-3/10240"}
    with pytest.raises(UserError, match="another range"):
        store.read("x.tar", 5, 9)
    web.headers = {"Content-Encoding": "gzip"}
    with pytest.raises(UserError, match="compresses"):
        store.read("x.tar", 5, 9)


@pytest.mark.parametrize("kind", ["https", "s3"])
@pytest.mark.parametrize("faults", [[503] * 5, [500, 429, 502, 504], ["reset"] * 3, ["short"] * 3, ["short", 503, "reset"]])
def test_what_may_pass_is_tried_again(
    kind: str, faults: list[int | str | None], web: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = faulty(kind, web, monkeypatch)
    web.faults = list(faults)
    assert store.read("x.tar", 100, 5000) == DATA[100:5000]
    # aiohttp itself repeats a request on a connection that the server has closed.
    assert len(faults) < len(web.requests) <= 2 * len(faults) + 1


@pytest.mark.parametrize("kind", ["https", "s3"])
def test_what_does_not_pass_is_said_in_one_sentence(kind: str, web: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    store = faulty(kind, web, monkeypatch)
    web.faults = [503] * 99
    with pytest.raises(UserError, match=r"x\.tar, bytes 5 to 8, cannot be read in 6 tries \(HTTP 503.*\); check") as caught:
        store.read("x.tar", 5, 9)
    assert len(web.requests) == retries.TRIES
    assert "secret" not in str(caught.value) and caught.value.__cause__ is None and caught.value.__suppress_context__
    web.requests.clear()
    for status in (403, 401, 400, 404):
        web.faults = [status]
        with pytest.raises(UserError, match=rf"HTTP {status}|does not exist"):
            store.read("x.tar", 5, 9)
    assert len(web.requests) == 4
    web.faults = ["short"] * 99
    with pytest.raises(UserError, match=r"x\.tar, bytes 5 to 8, cannot be read in 6 tries"):
        store.read("x.tar", 5, 9)


@pytest.mark.parametrize("kind", ["https", "s3"])
def test_a_server_that_hangs_ends_in_an_error(kind: str, web: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    store = faulty(kind, web, monkeypatch)
    assert store.read("x.tar", 5, 9) == DATA[5:9]
    monkeypatch.setattr(retries, "TIMEOUT_S", 0.3)
    monkeypatch.setattr(retries, "TRIES", 3)
    web.faults = ["hang", "hang"]
    assert store.read("x.tar", 5, 9) == DATA[5:9]
    web.faults = ["hang"] * 9
    began = time.monotonic()
    with pytest.raises(UserError, match=r"x\.tar.*in 3 tries \(it took too long\)"):
        store.read("x.tar", 5, 9)
    assert time.monotonic() - began < 10


def test_nothing_listens(web: FakeServer, monkeypatch: pytest.MonkeyPatch, free_port: int) -> None:
    monkeypatch.setenv("GRAFT_TRUSTED_HOSTS", "127.0.0.1, no-such-host.invalid:80")
    with pytest.raises(UserError, match=r"in 6 tries \(ECONNREFUSED\)"):
        open_store(f"http://127.0.0.1:{free_port}").read("x.tar")
    began = time.monotonic()
    with pytest.raises(UserError, match="no-such-host"):
        open_store("http://no-such-host.invalid").read("x.tar")
    assert time.monotonic() - began < 10


def faulty(kind: str, web: FakeServer, monkeypatch: pytest.MonkeyPatch) -> Store:
    web.files = {"/bucket/x.tar": DATA}
    if kind == "https":
        return open_store(web.url + "/bucket")
    use_s3(monkeypatch, web.url)
    return open_store("s3://bucket")


@pytest.mark.parametrize("path", ["x.tar", "samples/x.npy"])
def test_https_reads_with_a_checked_certificate(tls_web: FakeServer, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tls_web.files = {f"/{path}": DATA}
    monkeypatch.setenv("GRAFT_TRUSTED_HOSTS", "127.0.0.1")
    monkeypatch.setattr(web_store, "_sessions", {})
    assert open_store(tls_web.url).read(path, 1, 5) == DATA[1:5]
    monkeypatch.setenv("SSL_CERT_FILE", "/dev/null")
    monkeypatch.setattr(web_store, "_sessions", {})
    with pytest.raises(UserError, match="certificate is not trusted"):
        open_store(tls_web.url).read(path, 1, 5)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "[::1]", "[::ffff:127.0.0.1]", "0"],
)
def test_this_machine_is_not_read_in_any_spelling(tls_web: FakeServer, host: str) -> None:
    tls_web.files = {"/x.tar": DATA}
    with pytest.raises(UserError, match=r"private network|no host|cannot be read"):
        open_store(f"https://{host}:{tls_web.port}").read("x.tar", 0, 5)
    assert tls_web.connections == 0


@pytest.mark.parametrize("address", ["127.0.0.1", "169.254.169.254", "10.0.0.7", "::ffff:192.168.0.1", "fd00:ec2::254"])
def test_a_name_that_resolves_into_a_private_network_is_not_read(
    tls_web: FakeServer, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo

    def resolve(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        return real(address if host in ("evil.example.com", b"evil.example.com") else host, port, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(UserError, match="private network"):
        open_store(f"https://evil.example.com:{tls_web.port}").read("x.tar", 0, 5)
    assert tls_web.connections == 0


@pytest.mark.parametrize(
    ("location", "word"),
    [
        ("https://127.0.0.1:{port}/x.tar", "private network"),
        ("https://2130706433:{port}/x.tar", "private network|cannot be read"),
        ("https://[::ffff:7f00:1]:{port}/x.tar", "private network"),
        ("https://localhost:{port}/x.tar", "private network"),
        ("https://169.254.169.254/latest/meta-data/", "private network"),
        ("//169.254.169.254/latest", "redirects to http://169"),
        ("http://169.254.169.254/latest/meta-data/", "not to https"),
        ("http://localhost:{port}/x.tar", "not to https"),
        ("file:///etc/passwd", "no address|not to https"),
        ("ftp://example.com/x", "not to https"),
        ("https://user:secret@example.com/x", "user name"),
        ("https://", "no address"),
        ("", "no address"),
        ("/loop", "more than 5 times"),
    ],
)
def test_redirects_are_as_suspect_as_addresses(
    web: FakeServer, tls_web: FakeServer, location: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFT_TRUSTED_HOSTS", f"127.0.0.1:{web.port}")
    web.redirects = {"/x.tar": location.format(port=tls_web.port), "/loop": "/loop"}
    with pytest.raises(UserError, match=word) as caught:
        open_store(web.url).read("x.tar", 0, 5)
    assert tls_web.connections == 0 and len(web.requests) <= 7 and "secret" not in str(caught.value)


def test_a_redirect_to_a_trusted_host_is_followed_for_a_trusted_host_only(web: FakeServer) -> None:
    web.files, web.redirects = {"/b/x.tar": DATA}, {"/a/x.tar": "../b/x.tar?signature=secret"}
    web.files["/b/x.tar?signature=secret"] = DATA
    assert open_store(web.url + "/a").read("x.tar", 3, 7) == DATA[3:7]
    web.faults = [None, 403]
    with pytest.raises(UserError, match="403") as caught:
        open_store(web.url + "/a").read("x.tar", 3, 7)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::808:808", True),
        *((text, False) for text in ("0.0.0.0", "10.1.2.3", "100.64.0.1", "100.100.100.200", "127.0.0.1", "169.254.169.254")),
        *((text, False) for text in ("172.16.0.1", "192.0.0.192", "192.168.1.1", "198.18.0.1", "224.0.0.1", "240.0.0.1")),
        *((text, False) for text in ("168.63.129.16", "255.255.255.255", "::", "::1", "fe80::1%eth0", "fc00::1", "ff02::1")),
        *((text, False) for text in ("::ffff:10.0.0.1", "::ffff:a9fe:a9fe", "::127.0.0.1", "64:ff9b::a9fe:a9fe", "fec0::1")),
        *((text, False) for text in ("2002:7f00:1::", "2002:a9fe:a9fe::1", "2001:db8::1", "64:ff9b:1::1", "fd00:ec2::254")),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public


def _read(store: Store) -> bytes:
    return store.read("x.tar", 5, 9)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("kind", ["local", "https", "s3"])
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_store_is_usable_in_another_process(
    kind: str, method: str, tmp_path: Path, web: FakeServer, request: pytest.FixtureRequest
) -> None:
    web.files = {"/x.tar": DATA}
    place: str = request.getfixturevalue("s3") if kind == "s3" else {"local": str(tmp_path), "https": web.url}[kind]
    store = open_store(place)
    if kind != "https":
        store.write("x.tar", DATA)
    assert _read(store) == DATA[5:9]  # opens what a fork must not share
    assert pickle.loads(pickle.dumps(store)) == store
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply_async(_read, (store,)).get(60) == DATA[5:9]
    assert _read(store) == DATA[5:9]


def test_credentials_that_are_wrong_or_missing(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"it does not exist"):
        open_store("s3://no-such-bucket/x").read("x.tar", 0, 5)
    assert not open_store("s3://no-such-bucket/x").exists("x.tar")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(objects, "_systems", {})
    with pytest.raises(UserError, match=r"no credentials were found\); check the address, the credentials"):
        open_store(s3).read("x.tar", 0, 5)


def test_waits_double_and_are_not_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)

    def fail() -> None:
        raise TimeoutError

    with pytest.raises(UserError, match=r"x in 6 tries \(it took too long\); y"):
        retries.retried(fail, "x", "y")
    assert len(waits) == 5 and all(2**n / 2 <= wait <= 2**n for n, wait in enumerate(waits)) and sum(waits) < 60
    with pytest.raises(TypeError):
        retries.retried(lambda: len(1), "x", "y")  # type: ignore[arg-type]
