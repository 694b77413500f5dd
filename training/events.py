"""The metrics log: JSON lines {"time", "stage", "trial", "images", "metrics"}, one writer a file."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def append_event(path: Path, *, stage: str, images: int, metrics: Mapping[str, Any], trial: str = "") -> None:
    """Add one line; a line that a killed writer left half-written is closed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    event = {"time": round(time.time(), 3), "stage": stage, "trial": trial, "images": images, "metrics": dict(metrics)}
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(event).encode() + b"\n")


def read_events(path: Path) -> list[dict[str, Any]]:
    """All whole lines of the log; none where there is no file."""
    events = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            try:
                events.append(json.loads(line))
            except json.JSONDecodeError:
                continue  # the half-written line of a killed writer
    return events


def cut_events(path: Path, images: int) -> None:
    """Drop the lines past ``images``: a resumed run writes them again."""
    kept = [event for event in read_events(path) if event["images"] <= images]
    if path.exists():
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(json.dumps(event) + "\n" for event in kept))
        partial.replace(path)
