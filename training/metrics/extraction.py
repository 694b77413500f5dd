"""Features and moments of whole sets: in chunks, over workers where there are some, once for each set and net.

A chunk is so many images whatever computes it, and chunks are put together in their order, so that any number of workers
gives the bits of a single process. What took over a second is kept under the hash of images, net, resizer and device.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from data_shards import load_images
from data_shards.files import write_bytes
from training.metrics.features import FEATURE_NETS, FeatureNet, cache_dir, load_feature_net
from training.metrics.frechet import Moments, merge_moments, moments
from training.source import open_cached
from training.world import device

CHUNK = 1024  # images; part of the result, since moments of chunks are merged
WORTH_KEEPING_S = 1.0
MOST_KEPT_BYTES = 8 << 30  # the longest unused files go first
VERSION = 1  # goes up when features of the same images change

MapFn = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


class Chunk(NamedTuple):
    """What a worker needs to compute one chunk's features: where the images lie, which, and the net by name and file."""

    place: str
    ids: tuple[int, ...]
    net: str
    file: str | None


def set_features(place: str, ids: Sequence[int] | np.ndarray, net: FeatureNet, map_fn: MapFn = map) -> Tensor:
    """Features (N, d) float32 of those images of the set at ``place``, in the order of ``ids``.

    Args:
        place: folder or URL of the set; every worker must see it, and the net's file.
        ids: sample ids.
        net: a net of `load_feature_net`; workers load it anew.
        map_fn: calls a function on each of many items, in any process, and yields the results in order.
    """
    def compute() -> dict[str, Tensor]:
        return {"features": torch.cat(list(map_fn(_here(chunk_features, net, map_fn), _chunks(place, ids, net))))}

    return _kept(_key("features", place, ids, net), compute)["features"]


def set_moments(place: str, ids: Sequence[int] | np.ndarray, net: FeatureNet, map_fn: MapFn = map) -> Moments:
    """Moments of the same features, without ever holding all of them: workers send one mean and scatter a chunk."""
    def compute() -> dict[str, Tensor]:
        whole = functools.reduce(merge_moments, map_fn(_here(chunk_moments, net, map_fn), _chunks(place, ids, net)))
        return {"images": torch.tensor(whole.images), "mean": whole.mean, "scatter": whole.scatter}

    kept = _kept(_key("moments", place, ids, net), compute)
    return Moments(int(kept["images"]), kept["mean"], kept["scatter"])


def moments_of(features: Tensor) -> Moments:
    """As `set_moments`, to the last bit, of features that are there already."""
    return functools.reduce(merge_moments, map(moments, features.split(CHUNK)))


def image_features(images: Tensor, net: FeatureNet) -> Tensor:
    """Features (N, d) of uint8 images in memory, kept by the hash of their pixels."""
    digest = hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()
    key = _hash(["pixels", VERSION, digest, list(images.shape), *_net_key(net)])
    return _kept(key, lambda: {"features": net.extract(images)})["features"]


def chunk_features(chunk: Chunk, net: FeatureNet | None = None) -> Tensor:
    """What a worker does; it loads the net unless it is given."""
    images, _ = load_images(open_cached(chunk.place), np.asarray(chunk.ids, np.int64))
    return (net or _worker_net(chunk.net, chunk.file)).extract(images)


def chunk_moments(chunk: Chunk, net: FeatureNet | None = None) -> Moments:
    """What a worker does where only the moments are wanted."""
    return moments(chunk_features(chunk, net))


def _here(work: Callable[..., Any], net: FeatureNet, map_fn: MapFn) -> Callable[[Chunk], Any]:
    """Without workers the net that is loaded is used; a worker gets its name only, since not every net can be pickled."""
    return functools.partial(work, net=net) if map_fn is map else work


@functools.lru_cache(maxsize=2)
def _worker_net(name: str, file: str | None) -> FeatureNet:
    if name in FEATURE_NETS or file is None:
        return load_feature_net(name, file, device())
    return load_feature_net(file, None, device())


def _chunks(place: str, ids: Sequence[int] | np.ndarray, net: FeatureNet) -> list[Chunk]:
    every = [int(i) for i in ids]
    return [Chunk(place, tuple(every[at:at + CHUNK]), net.name, net.file) for at in range(0, len(every), CHUNK)]


def _key(kind: str, place: str, ids: Sequence[int] | np.ndarray, net: FeatureNet) -> str:
    chosen = hashlib.sha256(np.asarray(ids, "<i8").tobytes()).hexdigest()
    return _hash([kind, VERSION, open_cached(place).manifest.sha256, chosen, *_net_key(net)])


def _net_key(net: FeatureNet) -> list[str]:
    return [net.hash, net.resizer, device().type]


def _hash(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()


def _kept(key: str, compute: Callable[[], dict[str, Tensor]]) -> Mapping[str, Tensor]:
    path = cache_dir() / "features" / f"{key}.safetensors"
    found = _read(path)
    if found is None:
        started = time.monotonic()
        found = compute()
        if time.monotonic() - started > WORTH_KEEPING_S:
            write_bytes(path, save({name: part.contiguous() for name, part in found.items()}, {"sha256": _digest(found)}))
            _prune(path.parent)
    return found


def _read(path: Path) -> dict[str, Tensor] | None:
    """What the file holds; None where there is none, or it is damaged, and so is computed again."""
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no dict
            digest = (file.metadata() or {}).get("sha256")
        path.touch()
    except (OSError, SafetensorError):
        return None
    return found if digest == _digest(found) else None


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _prune(folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for path in files:
        total += path.stat().st_size
        if total > MOST_KEPT_BYTES:
            path.unlink(missing_ok=True)
