"""Progress of long work: a bar on a terminal, one line per report elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from training.events import append_event

console = Console(highlight=False, soft_wrap=True)


class Show(Protocol):
    def __call__(self, done: float, note: str = "") -> None: ...


@contextmanager
def progress(label: str, total: float, unit: str) -> Iterator[Show]:
    """A callback ``show(done, note)`` for the length of the block."""
    if console.is_terminal:
        columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
                   TextColumn("{task.fields[note]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        with Progress(*columns, console=console) as bars:
            task = bars.add_task(label, total=total, note="")
            yield lambda done, note="": bars.update(task, completed=min(done, total), note=note)
    else:
        yield lambda done, note="": console.print(f"{label}  {done:.0f}/{total:.0f} {unit}  {note}", markup=False)


@contextmanager
def counting(label: str) -> Iterator[Callable[..., None]]:
    """`show(done, total, text)`: a bar on a terminal, and a line at each tenth elsewhere."""
    if console.is_terminal and not os.environ.get("CI"):
        with Progress() as bar:
            task = bar.add_task(label, total=None)
            yield lambda done, total, text=label: bar.update(task, completed=done, total=total or None,
                                                             description=text)
    else:
        tenths: list[Any] = []

        def show(done: int, total: int, text: str = label) -> None:
            tenth = 10 * done // total if total else -1
            if tenth not in tenths:
                tenths.append(tenth)
                print(f"{text} {done}/{total}" if total else text, flush=True)

        yield show


@contextmanager
def timed(out: Path | None, stage: str, part: str = "") -> Iterator[None]:
    """Say how long it took, and write that to the run's events if there is a run."""
    started, completed = time.monotonic(), False
    try:
        yield
        completed = True
    finally:
        seconds = time.monotonic() - started
        if out:
            append_event(out / "events.jsonl", stage=stage, trial=part, images=0,
                         metrics={"seconds": round(seconds, 1), "completed": completed})
    console.print(f"{stage:<9} {f'{part} ' if part else ''}done in {seconds:.0f} s")
