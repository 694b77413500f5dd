"""Tasks over processes of this machine, with progress counted in images while they run."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from multiprocessing.reduction import ForkingPickler
from typing import Any

from data_shards.errors import UserError

POLL_S = 0.2
AHEAD = 2  # tasks per process that are handed over before the first is done
_PR_SET_PDEATHSIG = 1

Tick = Callable[[int, int], None]  # called after every few images with their number and bytes
Work = Callable[[Any, Tick], Any]
_counts: Any = None  # in a worker: images and bytes, shared with its parent


def over_processes(work: Work, tasks: Iterable[Any], processes: int, tick: Tick) -> Iterator[Any]:
    """`work(task, report)` for each task, results as they come; `tick(n, b)` is called when n more images of b bytes are done.

    One process is this one. More are forked where that is safe (Linux), and end with this process, however it ends. An
    error of a task is raised here, and the tasks that have not begun are dropped.
    """
    if processes <= 1:
        for task in tasks:
            yield work(task, tick)
        return
    remaining = iter(tasks)
    first = next(remaining, None)
    if first is None:
        return
    _check_portable(work, first)
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    counter = context.Array("Q", 3)
    shared = counter.get_obj()  # without the lock, which a killed process may hold
    pool = ProcessPoolExecutor(processes, context, _begin, (os.getpid(), counter))
    seen, waiting = (0, 0), set[Future[Any]]()
    remaining = chain([first], remaining)
    try:
        while True:
            while len(waiting) < AHEAD * processes and (task := next(remaining, None)) is not None:
                with warnings.catch_warnings():
                    # Forking beside threads: the worker uses no lock that one of them may hold.
                    warnings.simplefilter("ignore", DeprecationWarning)
                    waiting.add(pool.submit(_run, work, task))
            if not waiting:
                break
            done, waiting = wait(waiting, POLL_S, FIRST_COMPLETED)
            images, size, _ = shared[:]
            tick(images - seen[0], size - seen[1])
            seen = images, size
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise UserError(
            "a process that packed was killed, perhaps for want of memory; the same command with fewer --processes goes on"
            " from the finished shards"
        ) from None
    finally:
        shared[2] = 1  # whoever left early does not wait for whole shards
        pool.shutdown(wait=True, cancel_futures=True)


class _Stopped(Exception):
    """The parent no longer wants what this worker is at."""


def _check_portable(work: Work, task: Any) -> None:
    """Raises `UserError` for what cannot go to another process; a pool would hang on it."""
    try:
        ForkingPickler.dumps((work, task))
    except Exception as error:  # pickling runs whatever the source holds
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"this source cannot go to other processes ({reason}); pack it with processes=1") from None


def _begin(parent: int, counter: Any) -> None:
    """In a new worker: interrupts are the parent's business, and its end is the worker's."""
    global _counts
    _counts = counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)


def _run(work: Work, task: Any) -> Any:
    return work(task, _count)


def _count(images: int, size: int) -> None:
    with _counts.get_lock():
        if _counts[2]:
            raise _Stopped
        _counts[0] += images
        _counts[1] += size
