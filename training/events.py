"""The metrics log: JSON lines {"time", "stage", "trial", "images", "metrics"}, one writer a file.

In an object store, which cannot append, ``.../events.jsonl`` is read and written as numbered parts of one line each,
``.../events/<images>-<count>.jsonl``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_shards.stores import Store
from training.folders import Folder, store_of

READERS = 16  # requests at a time


def append_event(path: Folder, *, stage: str, images: int, metrics: Mapping[str, Any], trial: str = "",
                 seconds: float | None = None) -> None:
    """Add one line; a line that a killed writer left half-written is closed first.

    Args:
        seconds: since the epoch, when it happened (default now).
    """
    happened = round(time.time() if seconds is None else seconds, 3)
    line = json.dumps({"time": happened, "stage": stage, "trial": trial, "images": images, "metrics": dict(metrics)}).encode()
    if isinstance(path, str):
        store, folder = _parts(path)
        count = 0
        while store.exists(f"{folder}/{images:012d}-{count}.jsonl"):
            count += 1
        store.write(f"{folder}/{images:012d}-{count}.jsonl", line + b"\n")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(line + b"\n")


def read_events(path: Folder) -> list[dict[str, Any]]:
    """All whole lines of the log; none where there is no file."""
    events = []
    for line in _text(path).splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # the half-written line of a killed writer
    return events


def cut_events(path: Folder, images: int) -> None:
    """Drop the lines past ``images``: a resumed run writes them again."""
    if isinstance(path, str):
        store, _ = _parts(path)
        for name in _part_names(path):
            if _images(name) > images:
                store.remove(name)
        return
    kept = [event for event in read_events(path) if event["images"] <= images]
    if path.exists():
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(json.dumps(event) + "\n" for event in kept))
        partial.replace(path)


def _text(path: Folder) -> str:
    if isinstance(path, Path):
        return path.read_text(errors="replace") if path.exists() else ""
    store, _ = _parts(path)
    with ThreadPoolExecutor(READERS) as pool:
        return "".join(part.decode(errors="replace") for part in pool.map(store.read, _part_names(path)))


def _parts(url: str) -> tuple[Store, str]:
    """The store of a log's folder, and the name of its parts' folder there."""
    parent, _, name = url.rpartition("/")
    return store_of(parent), name.removesuffix(".jsonl")


def _part_names(url: str) -> list[str]:
    store, folder = _parts(url)
    names = [name for name in store.names() if name.startswith(f"{folder}/") and name.endswith(".jsonl")]
    return sorted(names, key=lambda name: (_images(name), len(name), name))


def _images(name: str) -> int:
    return int(name.rpartition("/")[2].partition("-")[0])
