"""Checkpoints written while training goes on: a step pays for copying tensors to host memory, a thread for the rest.

Every rank has a `Snapshots` and calls its methods at the same steps. Each writes its share of the files; when all are there,
which the ranks tell each other between two steps, rank 0 makes the checkpoint exist. Threads take part in no collective, so
that none can wait for a rank that is gone.
"""

from __future__ import annotations

import json
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from data_shards.errors import Failure, UserError
from training.checkpoint import (
    Damaged,
    Files,
    NotWritten,
    Tensors,
    commit,
    images_of,
    prune,
    read_state,
    step_folder,
    steps,
    write_part,
)
from training.ema import whole_average
from training.engines import whole_weights
from training.folders import Folder, inside, remove_leftovers, write_file
from training.loop import NonFinite, State, Sums
from training.recipe import SCHEMA_VERSION
from training.world import World, device, gather_json, largest_over_ranks

Better = Literal["smallest", "largest"]
BEST_FILE = "best.json"
CLOSE_TIMEOUT_S = 20.0
_DONE, _RUNNING, _FAILED = 0, 1, 2


@dataclass(frozen=True)
class Part:
    """One file of a checkpoint: ``gather(rank)`` gives that rank its tensors, in host memory, changed by nobody any more.

    It is a collective; other ranks may get anything. ``size`` says about how large the file is beside the others.
    """

    size: int
    gather: Callable[[int], Mapping[str, Tensor]]


class Snapshots:
    """Writes checkpoints into ``folder`` in the background.

    Args:
        resumed: images of the checkpoint that this run started from; newer ones are damaged, so neither counted nor kept.
        keep: how many of the newest are kept.
        best: name of the metric whose best checkpoint is kept beside them; empty for none.
    """

    def __init__(self, folder: Folder, world: World, *, resumed: int, keep: int, best: str = "",
                 better: Better = "smallest") -> None:
        self.folder, self.world, self.keep, self.best, self.better = folder, world, keep, best, better
        self.stalled_s = 0.0  # training waited so long for this object
        if world.rank == 0 and isinstance(folder, Path):
            remove_leftovers(folder)
        # Also a barrier: nobody writes before the leftovers are gone.
        self._attempt: str = gather_json(secrets.token_hex(4), world)[0]
        names = steps(folder) if world.rank == 0 else []
        self._damaged = frozenset(name for name in names if images_of(name) > resumed)
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._part: Future[Any] | None = None  # of the checkpoint under way: this rank's files, by name
        self._commit: Future[Any] | None = None  # and, once all ranks' are there, what makes it exist
        self._finish: Callable[[Files], None] = lambda files: None
        self._broken: BaseException | None = None

    def later(self, job: Callable[[], None]) -> None:
        """Do ``job`` in the background, before whatever is asked for later; its error ends the next checkpoint."""
        self._submit(job)

    def gather(self, parts: Mapping[str, Part], owners: Mapping[str, int]) -> dict[str, Mapping[str, Tensor]]:
        """This rank's share of the files, after the checkpoint before is complete. A collective.

        Args:
            parts: by file stem, in the same order on all ranks.
            owners: the ranks that must have certain files; the others are dealt.

        Raises:
            NotWritten: when the one before could not be written; NonFinite, when it held such a value. On all ranks.
        """
        began = time.monotonic()
        self.wait()
        dealt = deal({stem: part.size for stem, part in parts.items()}, self.world.size, owners)
        gathered = {stem: part.gather(dealt[stem]) for stem, part in parts.items()}
        self.stalled_s += time.monotonic() - began
        return {stem: named for stem, named in gathered.items() if dealt[stem] == self.world.rank}

    def save(self, images: int, share: Tensors, state: Mapping[str, Any], files: Mapping[str, bytes] | None = None, *,
             safe: int | None = None) -> None:
        """Begin the checkpoint of ``images``. Every rank must call it after `gather`.

        Args:
            share: what `gather` gave.
            state: JSON-ready, as `save_checkpoint` takes it.
            files: written by rank 0 into ``folder`` beside the checkpoint, once that exists.
            safe: the newest checkpoint of at most so many images is kept too.
        """
        assert self._part is None, "gather waits for the checkpoint before"
        began = time.monotonic()
        target = step_folder(self.folder, images)

        def write() -> Files:
            _check_finite(share, images)
            return write_part(target, share, self._attempt)

        def finish(written: Files) -> None:
            commit(target, written, state, self._attempt)
            for name, data in (files or {}).items():
                write_file(self.folder, name, data)
            self._tidy(images, safe)

        self._finish = finish
        if self.world.size == 1:
            self._part = self._commit = self._submit(lambda: finish(write()))
        else:
            self._part = self._submit(write)
        self.stalled_s += time.monotonic() - began

    def settle(self) -> None:
        """Bring the checkpoint under way a step further, without waiting. A collective while there is one.

        Raises:
            NotWritten, NonFinite: as `gather`.
        """
        if self._part is None:
            return
        began = time.monotonic()
        if self._agreed() == _DONE:
            self._advance()
        self.stalled_s += time.monotonic() - began

    def wait(self) -> None:
        """Wait until the checkpoint under way exists. A collective while there is one.

        Raises:
            NotWritten, NonFinite: as `gather`.
        """
        while self._part is not None:
            self._current().exception()  # waits
            self._agreed()
            self._advance()

    def close(self) -> None:
        """End the thread; what is under way may finish within `CLOSE_TIMEOUT_S`."""
        if self._thread:
            self._jobs.put(None)
            self._thread.join(CLOSE_TIMEOUT_S)

    def _current(self) -> Future[Any]:
        current = self._commit or self._part
        assert current is not None
        return current

    def _agreed(self) -> int:
        """What the slowest rank has come to; raises on all ranks what failed on one."""
        current = self._current()
        own = _RUNNING if not current.done() else _FAILED if current.exception() else _DONE
        worst = largest_over_ranks(own, self.world)
        if worst == _FAILED:
            self._part = self._commit = None
            _raise_everywhere(current.exception() if current.done() else None, self.world)
        return worst

    def _advance(self) -> None:
        assert self._part is not None
        if self._commit is not None:
            self._part = self._commit = None
            return
        files: Files = {name: tuple(entry) for part in gather_json(self._part.result(), self.world)
                        for name, entry in part.items()}
        if self.world.rank == 0:
            self._commit = self._submit(partial(self._finish, files))
        else:
            self._commit = Future()
            self._commit.set_result(None)

    def _tidy(self, images: int, safe: int | None) -> None:
        """Choose the best checkpoint, and remove those that are neither it nor among the newest."""
        self._damaged = frozenset(name for name in self._damaged if images_of(name) > images)
        names = [name for name in steps(self.folder) if name not in self._damaged]
        best = choose_best(self.folder, names, self.best, self.better) if self.best else None
        if best:
            name, value = best
            content = {"schema_version": SCHEMA_VERSION, "metric": self.best, "better": self.better, "value": value,
                       "checkpoint": name, "images": images_of(name)}
            write_file(self.folder, BEST_FILE, _json(content))
        prune(self.folder, self.keep, safe, also=best[0] if best else "", ignore=self._damaged)

    def _submit(self, job: Callable[[], Any]) -> Future[Any]:
        if self._thread is None:  # a daemon: a rank that failed must not stay for a disk that hangs
            self._thread = threading.Thread(target=self._work, daemon=True, name="checkpoints")
            self._thread.start()
        future: Future[Any] = Future()
        self._jobs.put((future, job))
        return future

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            future, job = item
            try:
                if self._broken:
                    raise self._broken
                future.set_result(job())
            except BaseException as error:
                self._broken = error
                future.set_exception(error)


def deal(sizes: Mapping[str, int], ranks: int, owners: Mapping[str, int] | None = None) -> dict[str, int]:
    """Which rank writes which file: the largest first, each to the rank that has least; the same on every rank.

    Args:
        owners: ranks of the files that are not dealt.
    """
    dealt = {stem: rank for stem, rank in (owners or {}).items() if stem in sizes}
    loads = [sum(sizes[stem] for stem, owner in dealt.items() if owner == rank) for rank in range(ranks)]
    for stem in sorted(sizes.keys() - dealt.keys(), key=lambda stem: (-sizes[stem], stem)):
        dealt[stem] = loads.index(min(loads))
        loads[dealt[stem]] += sizes[stem]
    return dealt


def choose_best(parent: Folder, names: list[str], metric: str, better: Better) -> tuple[str, float] | None:
    """The checkpoint of the best value of a metric, and that value; of equal ones the newest; None where none has it."""
    found = []
    for name in names:
        try:
            metrics = read_state(inside(parent, name)).get("metrics") or {}
        except Damaged:
            continue
        if metric in metrics:
            found.append((metrics[metric] if better == "largest" else -metrics[metric], name))
    if not found:
        return None
    value, name = max(found)
    return name, value if better == "largest" else -value


def check_metric(name: str, metrics: Mapping[str, float]) -> None:
    """Raises `UserError` listing the metrics unless ``name`` is one of them or empty."""
    if name and name not in metrics:
        raise UserError(f"training.keep_best = {name!r} is not a metric of this run; choose one of "
                        f"{', '.join(sorted(metrics))}.")


def checkpoint_parts(state: State) -> dict[str, Part]:
    """Every file of a checkpoint: weights, averages and optimizer states."""
    sizes = {name: sum(p.numel() for p in engine.module.parameters()) for name, engine in state.engines.items()}
    found = {name: Part(sizes[name], partial(whole_weights, engine)) for name, engine in state.engines.items()}
    for name, average in state.averages.items():
        found[f"{name}_ema"] = Part(sizes[name], partial(whole_average, average, state.engines[name]))
    for name, engine in state.engines.items():
        found[f"{name}_optimizer"] = Part(2 * sizes[name], engine.optimizer_state)
    return found


def unreported(state: State, world: World) -> dict[str, Any]:
    """What has been summed since the last report, JSON-ready; a checkpoint may lie between two reports. A collective."""
    sums = [{"names": names, "values": each.values.tolist(), "finite": float(each.finite), "taken": each.taken}
            for names, each in state.sums.items()]
    return {"steps": state.steps, "sums": gather_json(sums, world), "waited_s": state.waited_s,
            "seconds": time.monotonic() - state.clock}


def report_begun(saved: Mapping[str, Any], world: World) -> dict[str, Any]:
    """The reverse of `unreported`: fields of `State`.

    At another world size each rank takes the mean over the ranks, which gives the same means but for rounding.
    """
    kept = saved.get("unreported")
    if not kept:  # a new run, or a checkpoint of an older graft
        return {}
    ranks = kept["sums"]
    sums = {}
    for number, each in enumerate(ranks[world.rank] if len(ranks) == world.size else ranks[0]):
        values = torch.tensor(each["values"])
        if len(ranks) != world.size:
            values = torch.tensor([rank[number]["values"] for rank in ranks]).mean(0)
        sums[tuple(each["names"])] = Sums(values.to(device()), torch.tensor(each["finite"], device=device()), each["taken"])
    return {"steps": kept["steps"], "sums": sums, "waited_s": kept["waited_s"], "clock": time.monotonic() - kept["seconds"]}


def _check_finite(tensors: Tensors, images: int) -> None:
    for stem, named in tensors.items():
        for name, tensor in named.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise NonFinite(f"{name} of {stem} is not finite after {images} images; no checkpoint holds that.")


def _raise_everywhere(own: BaseException | None, world: World) -> None:
    """Raise this rank's error, or a copy of another's. A collective."""
    said = {"kind": type(own).__name__, "text": str(own)} if own else None
    others = [each for each in gather_json(said, world) if each]
    if own:
        raise own
    kinds: dict[str, Callable[[str], Failure]] = {"NotWritten": NotWritten, "NonFinite": NonFinite}
    make = kinds.get(others[0]["kind"])
    raise make(others[0]["text"]) if make else Failure(f"a checkpoint failed: {others[0]['kind']}: {others[0]['text']}")


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()
