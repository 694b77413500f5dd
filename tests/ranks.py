"""Run a function on real processes that form a gloo group, and give back what each returned."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from training.world import World, destroy_group


def _entry(rank: int, function: Callable[..., Any], size: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))  # as every launcher does
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size)
    try:
        result = function(World(rank, size), *arguments)
        torch.save(result, Path(folder) / f".{rank}.pt")
        (Path(folder) / f".{rank}.pt").rename(Path(folder) / f"{rank}.pt")
        # A rank that leaves its group while another is still in the last collective can abort: all leave together.
        deadline = time.monotonic() + 60
        while len(list(Path(folder).glob("[0-9]*.pt"))) < size and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        destroy_group()


def run_ranks(function: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """``function(world, *arguments)`` on ``size`` processes; the results by rank. ``function`` is a module's top-level one."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_entry, args=(function, size, folder, arguments), nprocs=size)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(size)]
