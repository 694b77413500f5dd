"""Stopping early and in order: a signal, or a file that another process leaves, is answered with a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from data_shards.errors import Failure
from training.folders import Folder

STOP_FILE = ".stop"
RESIZE_FILE = ".resize"  # the same, from who wants to go on with another number of ranks
CHECK_EVERY_STEPS = 4  # the ranks must agree, which costs a small message

StopAsked = Callable[[], bool]


class Stopped(Failure):
    """Training ended early because that was asked for; its state is in a checkpoint."""

    def __init__(self, images: int) -> None:
        super().__init__(f"stopped at {images} images, as was asked; the same command goes on from there")
        self.images = images


@contextmanager
def stop_requests(folder: Folder) -> Iterator[StopAsked]:
    """Whether, since the block began, this process got SIGTERM (only in a main thread can it be caught) or somebody made
    the file `STOP_FILE` or `RESIZE_FILE` in ``folder``, where that is not in an object store."""
    asked = threading.Event()

    def note(_signal: int, _frame: FrameType | None) -> None:
        asked.set()

    catches = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, note) if catches else None
    try:
        yield lambda: asked.is_set() or (isinstance(folder, Path) and (
            (folder / STOP_FILE).exists() or (folder / RESIZE_FILE).exists()))
    finally:
        if catches:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def sigterm_asks(folder: Path) -> Iterator[StopAsked]:
    """While inside, SIGTERM to this process, which does not train itself, asks the ranks that train in ``folder`` to stop.

    Yields whether it did.
    """
    (folder / STOP_FILE).unlink(missing_ok=True)  # of a driver that was killed before it could remove it
    with stop_requests(folder / "no folder") as asked:
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.1):
                if asked():
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / STOP_FILE).touch()
                    return

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield asked
        finally:
            ended.set()
            watcher.join()
            (folder / STOP_FILE).unlink(missing_ok=True)
