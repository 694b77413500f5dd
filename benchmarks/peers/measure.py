"""What is the same for every peer: two epochs over a loader, their times, processor seconds and memory, as one line of JSON.

A peer's program calls `main(write, open_loader)`:

- `write(samples, folder)` makes the peer's own format once, of the very PNG bytes that the others get;
- `open_loader(job)` returns a function that gives one epoch of (uint8 images (b, C, H, W), labels) as torch tensors.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

Epoch = Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor]]]


@dataclass(frozen=True)
class Job:
    """What a peer is to read, and how."""

    peer: str
    source: str  # a set of graft's, plain tars of PNG with a manifest beside them
    samples: str  # folder with the same PNG bytes end to end, for the peers' writers
    folder: str  # of the peer's own format
    count: int
    shape: tuple[int, int, int]
    workers: int
    batch: int = 64
    seed: int = 0
    cache: bool = False  # graft: keep decoded images
    url: str = ""  # a set on an S3 server, instead of the local disk
    check: bool = False  # count and add up all pixels, and wait for memory to be looked at, instead of timing


def decode(data: bytes) -> np.ndarray:
    """PNG bytes -> uint8 (C, H, W), by Pillow: what every peer but graft decodes with."""
    pixels = np.asarray(Image.open(io.BytesIO(data), formats=("PNG",)))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def collate(samples: Sequence[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Arrays, not tensors: a small batch of tensors would cost a shared-memory file each, and slow every peer down."""
    return np.stack([image for image, _ in samples]), np.array([label for _, label in samples])


def tensors(batches: Iterable[Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for images, labels in batches:
        yield torch.as_tensor(images), torch.as_tensor(labels)


def stored_samples(folder: str) -> Iterator[tuple[bytes, int]]:
    """The (PNG bytes, label) that every writer converts."""
    table = np.load(Path(folder) / "table.npy")  # offset, size, label
    data = (Path(folder) / "samples.bin").read_bytes()
    for offset, size, label in table.tolist():
        yield data[offset : offset + size], label


def main(write: Callable[[Iterator[tuple[bytes, int]], str], None] | None, open_loader: Callable[[Job], Epoch]) -> None:
    job = Job(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    if write is not None and not Path(job.folder).exists():
        write(stored_samples(job.samples), job.folder + ".partial")
        os.rename(job.folder + ".partial", job.folder)
    result = _checked(job, open_loader) if job.check else _timed(job, open_loader)
    print("RESULT " + json.dumps(result), flush=True)
    os._exit(0)  # some peers' threads wait for minutes; whatever they have left is not measured


def _timed(job: Job, open_loader: Callable[[Job], Epoch]) -> dict[str, Any]:
    first_batch, epochs = 0.0, []
    cpu, start = _cpu_seconds(), time.perf_counter()
    epoch = open_loader(job)
    for _ in range(2):
        images = 0
        for batch, _labels in epoch():
            first_batch = first_batch or time.perf_counter() - start
            images += len(batch)
        end, used = time.perf_counter(), _cpu_seconds()
        epochs.append({"images": images, "seconds": end - start, "cpu_seconds": used - cpu})
        cpu, start = used, end
    return {"first_batch": first_batch, "epochs": epochs}


def _checked(job: Job, open_loader: Callable[[Job], Epoch]) -> dict[str, Any]:
    before = psutil.Process().memory_full_info().pss
    images, labels, total = 0, 0, 0
    for batch, found in open_loader(job)():
        assert batch.dtype == torch.uint8 and batch.shape[1:] == tuple(job.shape), (batch.dtype, batch.shape)
        images, labels, total = images + len(batch), labels + int(found.sum()), total + int(batch.sum())
    return {"images": images, "labels": labels, "pixels": total, "imports_bytes": before}


def _cpu_seconds() -> float:
    """Processor seconds of this process, of its children that ended, and of those that live."""
    times = os.times()
    used = times.user + times.system + times.children_user + times.children_system
    for child in psutil.Process().children(recursive=True):
        try:
            found = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        used += found.user + found.system + found.children_user + found.children_system
    return used
