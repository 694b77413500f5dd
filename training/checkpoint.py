"""Checkpoints: a folder of safetensors and one `state.json`, written last, that holds the hash of every other file.

No pickle is written or read. In a file system a checkpoint gets its name when it is whole; in an object store, which cannot
rename, it exists when its `state.json` is there and every hash in it matches. A reader takes the newest whose hashes match and
says so when it had to pass one over.

Several ranks write one checkpoint by `write_part`, each its share of the files, and `commit` on one of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import shutil
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor

from data_shards.errors import Failure, UserError
from data_shards.files import hash_file, sync
from training.folders import Folder, FolderT, base_name, inside, read_file, remove_leftovers, store_of

FORMAT_VERSION = 1
STATE_FILE = "state.json"
SEEN_WITHIN_S = 30.0  # a shared file system shows one machine's files to another late
logger = logging.getLogger("graft")


class NotWritten(Failure):
    """A checkpoint could not be written; those before it are untouched."""


Tensors = Mapping[str, Mapping[str, Tensor]]
"""File stem ("generator", "generator_ema", "generator_optimizer", ...) -> name -> tensor."""

Files = dict[str, tuple[str, int]]
"""File name -> its sha256 and size in bytes."""


def save_checkpoint(folder: Folder, tensors: Tensors, state: Mapping[str, Any]) -> str:
    """Write ``folder`` whole or not at all; returns the hash of its `state.json`, which names the checkpoint's content.

    ``state`` must be JSON-ready and hold "images"; format version, library versions and file hashes are added.

    Raises:
        NotWritten: when the disk is full, or cannot be written.
    """
    commit(folder, write_part(folder, tensors, "one"), state, "one")
    return checkpoint_hash(folder)


def write_part(folder: Folder, tensors: Tensors, attempt: str) -> Files:
    """Write one rank's files of the checkpoint ``folder``, which does not exist before `commit`.

    Args:
        attempt: the same on all ranks, and another one each time that a run starts: what a killed writer left is not taken
            for this one's.

    Raises:
        NotWritten: when the disk is full, or cannot be written; what was written is removed.
    """
    try:
        return {name: _write(folder, name, save(_plain(named)), attempt)
                for name, named in ((f"{stem}.safetensors", named) for stem, named in tensors.items())}
    except (OSError, SafetensorError, UserError) as error:
        raise _not_written(folder, attempt, error) from error


def commit(folder: Folder, files: Files, state: Mapping[str, Any], attempt: str) -> None:
    """Make the checkpoint exist, once every rank has written its part: ``files`` are those of all parts.

    Raises:
        NotWritten: when that cannot be written, or a file of another rank is not seen from here.
    """
    text = json.dumps({"format_version": FORMAT_VERSION, **state, "versions": versions(),
                       "files": {name: sha256 for name, (sha256, _) in sorted(files.items())}}, indent=1)
    try:
        _await(folder, files, attempt)
        _write(folder, STATE_FILE, text.encode(), attempt)
        if isinstance(folder, Path):
            partial = _partial(folder, attempt)
            sync(partial)
            replaced = folder.with_name(f".{folder.name}.replaced.partial")
            if folder.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                folder.rename(replaced)
            partial.rename(folder)
            sync(folder.parent)
            shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, UserError) as error:
        raise _not_written(folder, attempt, error) from error


def _plain(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}


def _partial(folder: Path, attempt: str) -> Path:
    return folder.with_name(f".{folder.name}.{attempt}.partial")


def _write(folder: Folder, name: str, data: bytes, attempt: str) -> tuple[str, int]:
    if isinstance(folder, Path):
        path = _partial(folder, attempt) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        sync(path)
    else:
        store_of(folder).write(name, data)
    return hashlib.sha256(data).hexdigest(), len(data)


def _await(folder: Folder, files: Files, attempt: str) -> None:
    """Wait until every file is seen from here in its full size."""
    until = time.monotonic() + SEEN_WITHIN_S
    waiting = dict(files)
    while True:
        for name, (_, size) in list(waiting.items()):
            if isinstance(folder, Path):
                path = _partial(folder, attempt) / name
                seen = path.exists() and path.stat().st_size == size
            else:
                seen = store_of(folder).exists(name) and store_of(folder).size(name) == size
            if seen:
                del waiting[name]
        if not waiting:
            return
        if time.monotonic() > until:
            raise OSError(f"{next(iter(waiting))} was written by another rank and is not seen here; put --out on storage that "
                          "all workers share")
        time.sleep(0.1)


def _not_written(folder: Folder, attempt: str, error: Exception) -> NotWritten:
    if isinstance(folder, Path):
        shutil.rmtree(_partial(folder, attempt), ignore_errors=True)
    reason = " ".join(str(getattr(error, "strerror", None) or error).split()).rstrip(".")
    return NotWritten(f"the checkpoint {folder} cannot be written ({reason}); mend that, for instance by freeing space, and "
                      "the same command goes on from the checkpoint before it.")


def load_checkpoint(folder: Folder, stems: tuple[str, ...] | None = None
                    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors by file stem (all, or those in ``stems``) and the state of a checkpoint.

    Raises:
        UserError: when the folder is not a whole checkpoint; the sentence names the file.
    """
    problem = checkpoint_problem(folder) if isinstance(folder, Path) else None  # what a store sends is hashed as it is read
    if problem:
        raise UserError(f"{folder} is not a usable checkpoint: {problem}.")
    try:
        state = read_state(folder)
        names = [f"{stem}.safetensors" for stem in stems] if stems else list(state["files"])
        for name in names:
            if name not in state["files"]:
                raise UserError(f"{folder} has no {name}; it holds {', '.join(state['files'])}.")
        return {Path(name).stem: _tensors(folder, name, state["files"][name]) for name in names}, state
    except (Damaged, SafetensorError) as error:
        raise UserError(f"{folder} is not a usable checkpoint: {error}.") from error


class Damaged(Exception):
    """Why a checkpoint is not whole."""


def read_state(folder: Folder) -> dict[str, Any]:
    """The content of a checkpoint's `state.json`; raises `Damaged`."""
    try:
        state: dict[str, Any] = json.loads(read_file(folder, STATE_FILE))
        if state["format_version"] > FORMAT_VERSION:
            raise Damaged(f"format {state['format_version']} is newer than this graft reads ({FORMAT_VERSION}); upgrade graft")
        if not isinstance(state["files"], dict):
            raise TypeError("files")
    except FileNotFoundError:
        raise Damaged(f"{STATE_FILE} is missing") from None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise Damaged(f"{STATE_FILE} is damaged ({type(error).__name__}: {error})") from None
    return state


def _tensors(folder: Folder, name: str, sha256: str) -> dict[str, Tensor]:
    if isinstance(folder, Path):
        return load_file(folder / name)
    return load(_checked(folder, name, sha256))


def _checked(folder: str, name: str, sha256: str) -> bytes:
    try:
        data = read_file(folder, name)
    except FileNotFoundError:
        raise Damaged(f"{name} is missing") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Damaged(f"{name} does not match its sha256")
    return data


def checkpoint_problem(folder: Folder) -> str | None:
    """Why ``folder`` is not a whole checkpoint, or None when every hash matches."""
    try:
        for name, expected in read_state(folder)["files"].items():
            if isinstance(folder, str):
                _checked(folder, name, expected)
            elif not (folder / name).exists():
                return f"{name} is missing"
            elif hash_file(folder / name) != expected:
                return f"{name} does not match its sha256"
    except Damaged as damaged:
        return str(damaged)
    return None


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder says that it is a checkpoint; `checkpoint_problem` says whether it is a whole one."""
    return (folder / STATE_FILE).is_file()


def latest_valid(parent: FolderT) -> FolderT | None:
    """The newest whole checkpoint ``parent/step-*``, saying which damaged ones were passed over; None when there is none."""
    for name in reversed(steps(parent)):
        folder = inside(parent, name)
        problem = checkpoint_problem(folder)
        if problem is None:
            return folder
        logger.warning("checkpoint %s is passed over: %s", folder, problem)
    return None


def steps(parent: Folder) -> list[str]:
    """The names of the checkpoints in ``parent``, damaged ones included, oldest first."""
    names = ([path.name for path in parent.glob("step-*")] if isinstance(parent, Path)
             else {name.partition("/")[0] for name in store_of(parent).names() if name.startswith("step-") and "/" in name})
    return sorted(names)


def step_folder(parent: FolderT, images: int) -> FolderT:
    return inside(parent, f"step-{images:012d}")


def images_of(folder: Folder) -> int:
    """The images seen that a checkpoint's name says."""
    return int(base_name(folder).removeprefix("step-"))


def prune(parent: Folder, keep: int, safe: int | None = None, *, also: str = "", ignore: frozenset[str] = frozenset()) -> None:
    """Remove all but the newest ``keep`` checkpoints, and what a killed writer left.

    The newest of at most ``safe`` images stays as well, and the one named ``also``. Those named in ``ignore``, which are
    damaged, are neither counted nor removed.
    """
    counted = [name for name in steps(parent) if name not in ignore]
    refuge = next((name for name in reversed(counted) if safe is not None and images_of(name) <= safe), "")
    for name in counted[:-keep]:
        if name not in (also, refuge):
            remove_checkpoint(inside(parent, name))
    if isinstance(parent, Path):
        remove_leftovers(parent)


def remove_checkpoint(folder: Folder) -> None:
    """Remove a checkpoint, which stops existing at once."""
    if isinstance(folder, Path):
        gone = folder.with_name(f".{folder.name}.removed.partial")
        folder.rename(gone)
        shutil.rmtree(gone)
        return
    store = store_of(folder)
    store.remove(STATE_FILE)
    for name in store.names():
        store.remove(name)


def checkpoint_hash(folder: Folder) -> str:
    """sha256 over the weights' hashes: the same weights have the same hash wherever and whenever they were written."""
    files = read_state(folder)["files"]
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python, graft and the libraries that decide a result."""
    found = {"python": platform.python_version()}
    for package in ("graft-gan", "torch", "deepspeed", "ray", "webdataset", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
