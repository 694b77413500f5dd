"""Checkpoints: a folder of safetensors and one `state.json`, written last, that holds the hash of every other file.

No pickle is written or read. A reader takes the newest folder whose hashes match and says so when it had to pass one over.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_shards.errors import Failure, UserError
from data_shards.files import hash_file, sync

FORMAT_VERSION = 1
STATE_FILE = "state.json"
logger = logging.getLogger("graft")

class NotWritten(Failure):
    """A checkpoint could not be written; those before it are untouched."""


Tensors = Mapping[str, Mapping[str, Tensor]]
"""File stem ("generator", "generator_ema", "generator_optimizer", ...) -> name -> tensor."""


def save_checkpoint(folder: Path, tensors: Tensors, state: Mapping[str, Any]) -> str:
    """Write ``folder`` whole or not at all; returns the hash of its `state.json`, which names the checkpoint's content.

    ``state`` must be JSON-ready and hold "images"; format version, library versions and file hashes are added.

    Raises:
        NotWritten: when the disk is full, or cannot be written.
    """
    try:
        _write(folder, tensors, state)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder.with_name(f".{folder.name}.partial"), ignore_errors=True)
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise NotWritten(f"the checkpoint {folder} cannot be written ({reason}); mend that, for instance by freeing space, and "
                         "the same command goes on from the checkpoint before it.") from error
    return checkpoint_hash(folder)


def _write(folder: Path, tensors: Tensors, state: Mapping[str, Any]) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    files = {}
    for stem, named in tensors.items():
        path = partial / f"{stem}.safetensors"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}, path)
        path.chmod(0o644)  # safetensors writes 0600, which no colleague could read
        sync(path)
        files[path.name] = hash_file(path)
    text = json.dumps({"format_version": FORMAT_VERSION, **state, "versions": versions(), "files": files}, indent=1)
    (partial / STATE_FILE).write_text(text)
    sync(partial / STATE_FILE)
    sync(partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    sync(folder.parent)


def load_checkpoint(folder: Path, stems: tuple[str, ...] | None = None) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors by file stem (all, or those in ``stems``) and the state of a checkpoint.

    Raises:
        UserError: when the folder is not a whole checkpoint; the sentence names the file.
    """
    problem = checkpoint_problem(folder)
    if problem:
        raise UserError(f"{folder} is not a usable checkpoint: {problem}.")
    state = json.loads((folder / STATE_FILE).read_text())
    names = [f"{stem}.safetensors" for stem in stems] if stems else list(state["files"])
    for name in names:
        if name not in state["files"]:
            raise UserError(f"{folder} has no {name}; it holds {', '.join(state['files'])}.")
    try:
        return {Path(name).stem: load_file(folder / name) for name in names}, state
    except SafetensorError as error:
        raise UserError(f"{folder} is not a usable checkpoint: {error}.") from error


def checkpoint_problem(folder: Path) -> str | None:
    """Why ``folder`` is not a whole checkpoint, or None when every hash matches."""
    try:
        state = json.loads((folder / STATE_FILE).read_text())
        if state["format_version"] > FORMAT_VERSION:
            return f"format {state['format_version']} is newer than this graft reads ({FORMAT_VERSION}); upgrade graft"
        for name, expected in state["files"].items():
            if hash_file(folder / name) != expected:
                return f"{name} does not match its sha256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        return f"{STATE_FILE} is damaged ({type(error).__name__}: {error})"
    return None


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder says that it is a checkpoint; `checkpoint_problem` says whether it is a whole one."""
    return (folder / STATE_FILE).is_file()


def latest_valid(parent: Path) -> Path | None:
    """The newest whole checkpoint ``parent/step-*``, saying which damaged ones were passed over; None when there is none."""
    for folder in sorted(parent.glob("step-*"), reverse=True):
        problem = checkpoint_problem(folder)
        if problem is None:
            return folder
        logger.warning("checkpoint %s is passed over: %s", folder, problem)
    return None


def step_folder(parent: Path, images: int) -> Path:
    return parent / f"step-{images:012d}"


def prune(parent: Path, keep: int, safe: int | None = None) -> None:
    """Remove all but the newest ``keep`` checkpoints, and what a killed writer left; the newest of at most ``safe`` images
    stays as well."""
    folders = sorted(parent.glob("step-*"), reverse=True)
    refuge = next((folder for folder in folders if safe is not None and folder <= step_folder(parent, safe)), None)
    for folder in folders[keep:]:
        if folder != refuge:
            shutil.rmtree(folder)
    for partial in parent.glob(".step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def checkpoint_hash(folder: Path) -> str:
    """sha256 over the weights' hashes: the same weights have the same hash wherever and whenever they were written."""
    files = json.loads((folder / STATE_FILE).read_text())["files"]
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
