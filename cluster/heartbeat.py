"""Hung workers: each says once a second how far it is; one that falls silent, or makes no step, is found and killed.

A rank that stops leaves the others waiting in a collective, and Ray by itself would not notice a stuck training thread at
all. A worker that is killed is a fault like any other: Ray Train starts the group again from the last checkpoint.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

BEAT_S = 1.0
ANSWER_S = 2.0


@dataclass
class Beat:
    """The last that was heard of a rank."""

    where: str  # "pid 12 on host"
    actor: Any
    images: int | None = None  # None before the first step
    step_age_s: float = 0.0  # at the time of hearing
    heard: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Hung:
    rank: int
    where: str
    actor: Any
    why: str


class Heartbeats:
    """What is known of the newest group's ranks; the clock is its own, so that the nodes' clocks need not agree."""

    def __init__(self) -> None:
        self.group = ""  # an attempt's address
        self.size = 0
        self.beats: dict[int, Beat] = {}
        self.refusal = ""

    def refuse(self, sentence: str) -> None:
        """A worker's refusal of the recipe: another start would not help, and the driver says why."""
        self.refusal = sentence

    def refused(self) -> str:
        return self.refusal

    def join(self, group: str, rank: int, size: int, where: str, actor: Any) -> None:
        if group != self.group:
            self.group, self.size, self.beats = group, size, {}
        self.beats[rank] = Beat(where, actor)

    def beat(self, group: str, rank: int, images: int | None, step_age_s: float) -> None:
        if group == self.group and rank in self.beats:
            known = self.beats[rank]
            self.beats[rank] = Beat(known.where, known.actor, images, step_age_s)

    def leave(self, group: str, rank: int) -> None:
        if group == self.group:
            self.beats.pop(rank, None)

    def now(self) -> tuple[str, int, int]:
        """The newest group's name, its size, and how many of its ranks have joined and not left."""
        return self.group, self.size, len(self.beats)

    def hung(self, limit_s: float, first_step_s: float) -> list[Hung]:
        """The ranks to blame: those that do not answer; without such, of those that make no step the ones furthest behind."""
        clock = time.monotonic()
        silent = [Hung(rank, one.where, one.actor, f"has not answered for {clock - one.heard:.0f} s")
                  for rank, one in self.beats.items() if clock - one.heard > limit_s]
        if silent:
            return silent
        ages = {rank: one.step_age_s + clock - one.heard for rank, one in self.beats.items()}
        stuck = {rank: one for rank, one in self.beats.items()
                 if ages[rank] > (limit_s if one.images is not None else max(limit_s, first_step_s))}
        least = min((one.images or 0 for one in stuck.values()), default=0)
        return [Hung(rank, one.where, one.actor, f"has made no step for {ages[rank]:.0f} s")
                for rank, one in stuck.items() if (one.images or 0) == least]


@contextmanager
def beating(heartbeats: Any, rank: int, size: int) -> Iterator[Callable[[int], None]]:
    """In a worker: ``step(images)`` notes each step, and a thread of its own says so once a second until the block ends."""
    import ray

    group = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"  # Ray Train gives each attempt a free port
    latest: list[Any] = [None, time.monotonic()]
    ended = threading.Event()

    def step(images: int) -> None:
        latest[:] = images, time.monotonic()

    def say() -> None:
        while not ended.wait(BEAT_S):
            heartbeats.beat.remote(group, rank, latest[0], time.monotonic() - latest[1])

    ray.get(heartbeats.join.remote(group, rank, size, f"pid {os.getpid()} on {socket.gethostname()}",
                                   ray.get_runtime_context().current_actor))
    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield step
    finally:
        ended.set()
        thread.join()
        heartbeats.leave.remote(group, rank)


def answers(actor: Any) -> bool | None:
    """Whether the process of ``actor`` takes calls; None when it is dead, which is not hung and which Ray knows."""
    import ray

    try:
        call = actor.__ray_ready__.remote()
        done, _ = ray.wait([call], timeout=ANSWER_S)
        if done:
            ray.get(call)
        return bool(done)
    except ray.exceptions.RayError:
        return None
