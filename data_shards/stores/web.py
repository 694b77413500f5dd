"""Reads over https from addresses that others wrote, without becoming their way into a private network.

The check sits where a socket is made for an address that is already resolved, so that no spelling of an address, no
name that resolves to one, and no answer that changes between two look-ups gets around it. Redirects are followed here,
one by one, each as suspect as the first address.
"""

from __future__ import annotations

import atexit
import errno
import ipaddress
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

from data_shards.errors import UserError
from data_shards.stores import retries
from data_shards.stores.base import Store
from data_shards.stores.places import is_trusted
from data_shards.stores.retries import time_limit_s

if TYPE_CHECKING:
    import aiohttp

CONNECT_TIMEOUT_S = 10.0
MAX_REDIRECTS = 5
_REFUSED = "is not a public address"
# What Python's is_global lets through: Azure's metadata server, and ranges its tables learned of after 3.11.7.
_LOCAL = ("168.63.129.16/32", "192.0.0.0/24", "64:ff9b:1::/48", "fec0::/10", "5f00::/16")
_PRIVATE = [ipaddress.ip_network(text) for text in _LOCAL]
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

# One session per process and kind: connections and the event loop do not survive a fork.
_sessions: dict[tuple[int, bool], aiohttp.ClientSession] = {}


class StatusError(OSError):
    """An answer of the server that is not a file; `status` is the HTTP status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status


@dataclass(frozen=True)
class WebStore(Store):
    """A folder on a web server, read only."""

    def _read(self, name: str, start: int, end: int | None, cap: int) -> bytes:
        return _get(self.where(name), start, end, cap)[0]

    def _size(self, name: str) -> int:
        # Not HEAD: some servers refuse it, and the range shows at once whether they serve any.
        size = _get(self.where(name), 0, 1, 1)[1]
        if size is None:
            raise UserError(f"the server of {self.where(name)} does not say how long it is; give another address")
        return size

    def _remedy(self) -> str:
        return "check the address and that its server serves parts of files to everybody"


def is_public(address: str) -> bool:
    """Whether an IP address, resolved, is one that anybody on the Internet may be asked to read from."""
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(address.partition("%")[0])
    return all(
        each.is_global
        and not (each.is_multicast or each.is_reserved or each.is_loopback or each.is_link_local or each.is_unspecified)
        and not any(each in network for network in _PRIVATE)
        for each in _unwrapped(ip)
    )


def _unwrapped(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> Iterator[Any]:
    """The address, or the IPv4 address that it carries: mapped, 6to4, Teredo, NAT64."""
    if ip.version == 6:
        inner = [ip.ipv4_mapped or ip.sixtofour, *(ip.teredo or ())]
        if ip in _NAT64:
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        carried = [each for each in inner if each is not None]
        if carried:
            yield from carried
            return
    yield ip


def _public_socket(info: tuple[Any, Any, int, str, tuple[Any, ...]]) -> socket.socket:
    family, kind, protocol, _, address = info
    if family not in (socket.AF_INET, socket.AF_INET6) or not is_public(address[0]):
        raise OSError(errno.EACCES, f"{address[0]} {_REFUSED}")
    return socket.socket(family=family, type=kind, proto=protocol)


def _get(url: str, start: int, end: int | None, cap: int) -> tuple[bytes, int | None]:
    """Returns bytes [start, end) of a file, at most cap + 1 of them, and its size where the server says it."""
    import aiohttp
    from fsspec.asyn import get_loop, sync

    limit_s = time_limit_s(cap if end is None else end - start)
    try:
        found: tuple[bytes, int | None] = sync(get_loop(), _fetch, url, start, end, cap, limit_s, timeout=limit_s)
        return found
    except (aiohttp.ClientError, OSError) as error:
        inner: BaseException | None = error
        while inner is not None:
            if _REFUSED in str(inner):
                raise UserError(
                    f"{url} leads into a private network, which is not read; give a public address, or name the host in"
                    " GRAFT_TRUSTED_HOSTS if it is yours"
                ) from None
            inner = inner.__cause__
        raise


async def _fetch(url: str, start: int, end: int | None, cap: int, limit_s: float) -> tuple[bytes, int | None]:
    import aiohttp
    from yarl import URL

    target = URL(url)
    # A public server must not send us to the hosts that only we may read.
    may_trust = is_trusted(target.host or "", target.port)
    headers = {"Accept-Encoding": "identity"}
    if start or end is not None:
        headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
    timeout = aiohttp.ClientTimeout(total=limit_s, sock_connect=CONNECT_TIMEOUT_S, sock_read=retries.TIMEOUT_S)
    for _ in range(MAX_REDIRECTS + 1):
        trusted = may_trust and is_trusted(target.host or "", target.port)
        if target.scheme != "https" and not (trusted and target.scheme == "http"):
            raise UserError(f"{url} redirects to {target.scheme}://{target.host}, not to https; give another address")
        if target.user is not None or target.password is not None:
            raise UserError(f"{url} redirects to an address with a user name in it; give another address")
        session = _session(trusted)
        async with session.get(target, headers=headers, timeout=timeout, allow_redirects=False) as response:
            if response.status in (301, 302, 303, 307, 308):
                target = _location(url, target, response.headers.get("Location", ""))
                continue
            return await _body(response, url, start, end, cap)
    raise UserError(f"{url} redirects more than {MAX_REDIRECTS} times; give the address where that ends")


def _location(url: str, target: Any, location: str) -> Any:
    from yarl import URL

    try:
        found = URL(urljoin(str(target), location))
        if location and found.host:
            return found
    except ValueError:
        pass
    raise UserError(f"{url} redirects to something that is no address; give another address")


async def _body(response: aiohttp.ClientResponse, url: str, start: int, end: int | None, cap: int) -> tuple[bytes, int | None]:
    status = response.status
    header = response.headers.get("Content-Range", "")
    span = re.fullmatch(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18}|\*)", header)
    total = int(span[3]) if span and span[3] != "*" else None
    if status == 416:
        return b"", total
    if status in (404, 410):
        raise FileNotFoundError(url)
    if status not in (200, 206):
        raise StatusError(status)
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise UserError(f"the server of {url} compresses what it sends; give an address that serves the plain file")
    if status == 206 and (not span or span[1] is None or int(span[1]) != start):
        raise UserError(f"the server of {url} answers with another range than was asked for; give another address")
    if status == 200:
        total = response.content_length
        if start:
            raise UserError(f"the server of {url} does not serve parts of files; give one that does, or copy the set here")
    wanted = cap + 1 if end is None else end - start
    data = bytearray()
    async for part in response.content.iter_chunked(1 << 18):
        data += part
        if len(data) >= wanted:
            break
    if len(data) > wanted:
        del data[wanted:]
    if total is not None and len(data) < min(wanted, total - start):
        raise ConnectionResetError(errno.ECONNRESET, "the answer was cut short")
    return bytes(data), total


def _session(trusted: bool) -> aiohttp.ClientSession:
    """This process's session; made inside its event loop."""
    import aiohttp

    key = (os.getpid(), trusted)
    if key not in _sessions:
        import ssl

        connector = aiohttp.TCPConnector(
            limit=32, ssl=ssl.create_default_context(), socket_factory=None if trusted else _public_socket
        )
        # No proxy and no netrc from the environment: a proxy would connect for us, past the check.
        _sessions[key] = aiohttp.ClientSession(
            connector=connector, trust_env=False, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
        )
    return _sessions[key]


@atexit.register
def _close_sessions() -> None:
    from contextlib import suppress

    from fsspec.asyn import get_loop, sync

    for (pid, _), session in _sessions.items():
        if pid == os.getpid():
            with suppress(Exception):
                sync(get_loop(), session.close, timeout=1)
