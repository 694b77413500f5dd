"""Trying again what may pass by itself, and saying in one sentence what did not."""

from __future__ import annotations

import errno
import random
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from data_shards.errors import UserError

# Waits of 1, 2, 4, 8 and 16 s, each shortened by up to half so that the ranks of a run do not come back as one.
TRIES = 6
FIRST_WAIT_S = 1.0
GIVE_UP_AFTER_S = 90.0  # no new try after that, for servers that hang instead of failing
# Every request has a limit: a fixed part, and one second for each so many bytes.
TIMEOUT_S = 20.0
BYTES_PER_S = 100_000

T = TypeVar("T")

_TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504, 509, 520, 521, 522, 523, 524, 529}
_TRANSIENT_CODES = {
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "RequestTimeout",
    "RequestLimitExceeded",
    "InternalError",
    "ServiceUnavailable",
    "503",
}
_TRANSIENT_ERRNO = {
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.ECONNABORTED,
    errno.EPIPE,
    errno.ETIMEDOUT,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.EAGAIN,
}
# By name, because the packages they come from are optional.
_TRANSIENT_NAMES = {
    "ClientConnectionError",
    "ServerDisconnectedError",
    "ServerTimeoutError",
    "ClientPayloadError",
    "ClientConnectorError",
    "ClientOSError",
    "EndpointConnectionError",
    "ConnectionClosedError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "IncompleteReadError",
    "IncompleteRead",
    "ResponseStreamingError",
    "ServiceRequestError",
    "ServiceResponseError",
}
_OURS = (TypeError, AttributeError, NameError, LookupError, AssertionError, MemoryError)


def retried(action: Callable[[], T], what: str, remedy: str, patience_s: float = 0.0) -> T:
    """Runs `action`, again after errors that may pass: time-outs, lost connections, 5xx answers, throttling.

    It is tried again for at least `patience_s` seconds, however many tries that takes.

    `FileNotFoundError` passes through for the caller to judge. Any other error, or a passing one that did not pass in
    `TRIES` tries, becomes a `UserError` of `what` ("s3://b/x.tar, bytes 0-99, cannot be read"), reason and `remedy`.
    """
    began = time.monotonic()
    tries = 0
    while True:
        tries += 1
        try:
            return action()
        except (UserError, FileNotFoundError):
            raise
        except Exception as error:
            if isinstance(error, _OURS):
                raise
            passing = is_transient(error)
            waited = time.monotonic() - began
            if not passing or ((tries >= TRIES or waited > GIVE_UP_AFTER_S) and waited >= patience_s):
                often = f" in {tries} tries" if passing else ""
                # Not chained: an error of a client library may hold signed addresses.
                raise UserError(f"{what}{often} ({reason(error)}); {remedy}") from None
        time.sleep(FIRST_WAIT_S * 2 ** min(tries - 1, TRIES - 2) * random.uniform(0.5, 1.0))


def time_limit_s(size: int) -> float:
    """Seconds that a request for `size` bytes may take."""
    return TIMEOUT_S + size / BYTES_PER_S


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    chain = list(_chain(error))
    status = next((found for each in chain if (found := _status(each))), 0)
    if status:
        return status in _TRANSIENT_STATUS or any(_code(each) in _TRANSIENT_CODES for each in chain)
    for each in chain:
        if isinstance(each, ssl.SSLCertVerificationError) or type(each).__name__ == "ClientConnectorCertificateError":
            return False
        if isinstance(each, socket.gaierror) and each.errno == socket.EAI_NONAME:
            return False
    return any(
        isinstance(each, (TimeoutError, ConnectionError))
        or (isinstance(each, OSError) and each.errno in _TRANSIENT_ERRNO)
        or not _TRANSIENT_NAMES.isdisjoint(kind.__name__ for kind in type(each).__mro__)
        for each in chain
    )


def reason(error: BaseException) -> str:
    """A few words on an error, made of its kind alone: its text may hold a signed address or a header."""
    chain = list(_chain(error))
    for each in chain:
        if status := _status(each):
            code = _code(each)
            return f"HTTP {status}" + (f" {code}" if code and not code.isdigit() else "")
    for each in chain:
        name = type(each).__name__
        if isinstance(each, TimeoutError) or name.endswith("TimeoutError"):
            return "it took too long"
        if name in ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"):
            return "no credentials were found"
        if isinstance(each, ssl.SSLCertVerificationError):
            return "its certificate is not trusted"
        if isinstance(each, socket.gaierror):
            return "the host's name is not known"
    for each in reversed(chain):
        if isinstance(each, OSError) and each.errno and each.errno != errno.EIO:
            return errno.errorcode.get(each.errno, type(each).__name__)
    return type(error).__name__


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it, including the errors that clients keep in attributes."""
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting and len(seen) < 20:
        each = waiting.pop(0)
        if isinstance(each, BaseException) and not any(each is other for other in seen):
            seen.append(each)
            yield each
            kept = getattr(each, "kwargs", None)
            inner = kept.get("error") if isinstance(kept, dict) else None
            waiting += [each.__cause__, each.__context__, getattr(each, "os_error", None), inner]


def _status(error: BaseException) -> int:
    """The HTTP status in an error of aiohttp, botocore, gcsfs or azure; 0 if there is none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return found if isinstance(found, int) else 0
    # aiohttp gives the code 400 to bodies that it could not read to their end.
    for name in ("status", "status_code", "code")[: 2 if type(error).__module__.startswith("aiohttp") else 3]:
        found = getattr(error, name, None)
        if isinstance(found, int) and 100 <= found < 600:
            return found
    return 0


def _code(error: BaseException) -> str:
    response = getattr(error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return code[:40] if isinstance(code, str) and code.isalnum() else ""
