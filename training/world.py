"""Which part of the global batch is this process's, and sums over all processes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from data_shards.errors import Failure, UserError

LEAVE_TIMEOUT_S = 30.0
SETTLE_S = 0.2


@dataclass(frozen=True)
class World:
    """Rank of this process among ``size``; entry k of a global batch belongs to rank k mod size."""

    rank: int = 0
    size: int = 1

    def slice(self, batch: Tensor) -> Tensor:
        """This rank's entries of a global batch (dimension 0)."""
        return batch[self.rank::self.size]


def current_world() -> World:
    """The process group's world, or one process where there is no group."""
    return World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else World()


def join_world() -> World:
    """Join the group that a launcher's RANK and WORLD_SIZE describe, if any and not joined yet."""
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return current_world()


def leave_world(world: World) -> None:
    """Leave the group, all ranks together: one that is still in its last collective when another leaves can abort.

    The ranks wait for each other at the launcher's store, not by a collective, which would be the last one in its turn.
    """
    if world.size > 1:
        store = distributed_c10d._get_default_store()
        with suppress(RuntimeError):  # the store goes with rank 0, or with a launcher that has given up
            _count_up(store, "graft/done", world.size)
            _count_up(store, "graft/left", world.size if world.rank == 0 else 0)
    destroy_group()


def destroy_group() -> None:
    """Destroy this process's group, if any, and let its threads end what they are at.

    A gloo thread drops the tensors of the last collective after the caller has them, for which it takes the interpreter's lock:
    if the interpreter ends meanwhile, the thread is ended inside a destructor and the whole process aborts.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(SETTLE_S)


def _count_up(store: distributed_c10d.Store, key: str, wanted: int) -> None:
    """Add one, and wait a while until ``wanted`` ranks have."""
    until = time.monotonic() + LEAVE_TIMEOUT_S
    count = store.add(key, 1)
    while count < wanted and time.monotonic() < until:
        time.sleep(0.005)
        count = store.add(key, 0)


def lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because the process at its other end is gone."""
    said = str(error)
    return isinstance(error, dist.DistNetworkError) or "Connection closed by peer" in said or "Connection reset by peer" in said


def mean_over_ranks(values: Mapping[str, float], world: World) -> dict[str, float]:
    """Mean of each named value over the ranks; every rank must pass the same names."""
    if world.size == 1:
        return dict(values)
    names = sorted(values)
    total = torch.tensor([values[name] for name in names], dtype=torch.float64, device=device())
    dist.all_reduce(total)
    return dict(zip(names, (total / world.size).tolist(), strict=True))


def any_rank(value: bool, world: World) -> bool:
    """Whether the value is true on any rank. A collective."""
    return bool(largest_over_ranks(int(value), world))


def gather_json(value: Any, world: World) -> list[Any]:
    """The JSON-ready values of all ranks, by rank. A collective."""
    if world.size == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device())
    sizes = [torch.zeros(1, dtype=torch.int64, device=device()) for _ in range(world.size)]
    dist.all_gather(sizes, torch.tensor([len(data)], device=device()))
    padded = torch.zeros(int(max(sizes)), dtype=torch.uint8, device=device())
    padded[:len(data)] = data
    parts = [torch.empty_like(padded) for _ in range(world.size)]
    dist.all_gather(parts, padded)
    return [json.loads(bytes(part[:int(size)].tolist())) for part, size in zip(parts, sizes, strict=True)]


def from_rank_0(action: Callable[[], Any], world: World) -> Any:
    """What ``action`` returns on rank 0, JSON-ready, on every rank; its `UserError` or `Failure` likewise. A collective."""
    said: dict[str, Any] = {}
    if world.rank == 0:
        try:
            said = {"value": action()}
        except (UserError, Failure) as error:
            if world.size == 1:
                raise
            said = {"error": str(error), "user": isinstance(error, UserError)}
    found = gather_json(said, world)[0]
    if "error" in found:
        raise (UserError if found["user"] else Failure)(found["error"])
    return found["value"]


def rows_of_all(mine: Tensor, world: World, count: int | None = None) -> Tensor:
    """The rows of all ranks in the global order, on every rank. A collective.

    Args:
        count: rows in all, where the ranks have unlike numbers of them.
    """
    if world.size == 1:
        return mine
    whole = mine.new_zeros(count or len(mine) * world.size, *mine.shape[1:])
    whole[world.rank::world.size] = mine
    dist.all_reduce(whole)  # each row is non-zero on one rank only
    return whole


def largest_over_ranks(value: int, world: World) -> int:
    """The largest of the ranks' values. A collective."""
    if world.size == 1:
        return value
    found = torch.tensor([value], device=device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def device() -> torch.device:
    """The accelerator of this process (LOCAL_RANK's), or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def has_bf16(place: torch.device | None = None) -> bool:
    """Whether bf16 is native on ``place`` (default: this process's device); emulated it is slower than fp32."""
    if (place or device()).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
