"""Where a set may lie: which addresses are accepted, written out so that nothing else gets through.

Addresses come from recipes and shard lists that others wrote. They are literal text here: nothing is expanded, chained
or run, and what is not on the list below is refused before anything is opened.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from data_shards.errors import UserError

# Object stores and the package that reads each; fsspec alone knows "memory", which lives inside one process.
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "memory": "fsspec"}
ALLOWED = "a folder, file:///, https://, s3://, gs://, az:// or abfs://"
MAX_NAME = 255

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_HOST = re.compile(r"([A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
_PATH = re.compile(r"[A-Za-z0-9 ._~!()'+,=@:&;/-]*")
_WEB_PATH = re.compile(r"(?:[A-Za-z0-9._~!()'+,=@:&;/-]|%[0-9A-Fa-f]{2})*")


@dataclass(frozen=True)
class Place:
    """An accepted address: `scheme` is "file", "http", "https" or an object store's, `name` has no slash at its end."""

    scheme: str
    name: str
    local: Path | None = None


def parse_place(value: str | os.PathLike[str]) -> Place:
    """Returns the accepted form of an address; raises `UserError` naming value and remedy for any other.

    Accepted: a local path, `file:///path`, `https://host/path`, `s3://bucket/path`, `gs://`, `az://`, `abfs://`,
    `memory://`, and `http://` for the hosts in GRAFT_TRUSTED_HOSTS. Refused: commands (`pipe:`), other schemes, chains
    (`::`), and in a URL user names, queries, fragments, `..`, braces, `$` and everything that some tool would expand.
    """
    text = os.fspath(value)
    if not isinstance(text, str) or not text or not text.isprintable():
        raise UserError(f"{_shown(str(text))!r} is not an address of shards; give {ALLOWED}")
    # The colons of an IPv6 address are no chain.
    if "::" in re.sub(r"//\[[0-9A-Fa-f:.]+\]", "//", text):
        raise UserError(f"{_shown(text)!r} chains addresses with '::', which is not read; give {ALLOWED}")
    match = _SCHEME.match(text)
    if not match:
        if "://" in text:
            raise UserError(f"{_shown(text)!r} is neither a path nor an address; give {ALLOWED}")
        return Place("file", text, Path(text))
    scheme = match[1].lower()
    if scheme not in (*PACKAGES, "file", "http", "https") or not text.startswith("://", match.end(1)):
        raise UserError(f"{_shown(text)!r} is not an address that is read, as a command or another scheme; give {ALLOWED}")
    return _parse_url(text, scheme, text[match.end() + 2 :].rstrip("/"))


def check_name(name: str) -> str:
    """Returns a file's name inside a set, such as "samples/label.npy", if it is safe; raises `UserError` otherwise."""
    if len(name) > MAX_NAME or not _NAME.fullmatch(name):
        raise UserError(
            f"{name[:80]!r} is not the name of a file in a set; names are relative, of at most {MAX_NAME} characters from"
            " A-Z a-z 0-9 . _ - and /"
        )
    return name


def trusted_hosts() -> frozenset[str]:
    """The hosts in GRAFT_TRUSTED_HOSTS, in lower case: comma-separated `host` or `host:port`.

    Such a host may lie in a private network and may be read over plain http: a mirror inside the cluster.
    """
    return frozenset(part.strip().lower() for part in os.environ.get("GRAFT_TRUSTED_HOSTS", "").split(",") if part.strip())


def is_trusted(host: str, port: int | None) -> bool:
    """Whether the operator named this host (without brackets) in GRAFT_TRUSTED_HOSTS, alone or with this port."""
    host = host.lower()
    names = {host, f"[{host}]", f"{host}:{port}", f"[{host}]:{port}"}
    return not names.isdisjoint(trusted_hosts())


def _parse_url(text: str, scheme: str, rest: str) -> Place:
    head, slash, path = rest.partition("/")
    web = scheme in ("http", "https")
    segments = (unquote(path) if web else path).split("/")
    if not (_WEB_PATH if web else _PATH).fullmatch(path):
        raise UserError(
            f"{_shown(text)!r} holds characters that are not read in an address (user names, ? # {{ }} $ * % and their"
            " like); give it as plain text and credentials through the environment"
        )
    if any(segment in (".", "..", "") or not segment.isprintable() for segment in segments if slash):
        raise UserError(f"{_shown(text)!r} holds an empty, '.' or '..' segment; give the address without them")
    if scheme == "file":
        if head:
            raise UserError(f"{_shown(text)!r} names the host {head!r}; give file:///path with three slashes")
        return Place("file", f"/{path}", Path(f"/{path}"))
    if web:
        host = _HOST.fullmatch(head)
        if not host or int(host[2] or 1) not in range(1, 65536):
            raise UserError(f"{_shown(text)!r} names no host that is read; give https://host/path")
        port = int(host[2] or (443 if scheme == "https" else 80))
        if scheme == "http" and not is_trusted(host[1].strip("[]"), port):
            raise UserError(f"{text!r} is not encrypted; give https://, or name its host in GRAFT_TRUSTED_HOSTS if it is yours")
    elif not _BUCKET.fullmatch(head):
        raise UserError(f"{_shown(text)!r} names no bucket; give {scheme}://bucket/path")
    return Place(scheme, f"{scheme}://{rest}")


def _shown(text: str) -> str:
    """A refused address without what may be a secret: a password before @, a signature behind ?."""
    return re.sub(r"//.*@", "//...@", text).partition("?")[0][:200]
