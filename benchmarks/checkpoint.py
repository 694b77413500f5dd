"""What checkpoints cost a run: `python -m benchmarks.checkpoint`.

The same pretraining, same seed, is timed with checkpoints at the given interval and with none but the last, in turn, several
times each; the cost is the difference of their median times over the steps between the first report and the last, as a share.
Beside it stands what the trainer itself waited for (`Snapshots.stalled_s`), which leaves out what the background thread takes
from the processor, and the cost with checkpoints written in the step itself, as before.

The last checkpoints are checked to hold the same bits in all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.spawn import spawn

from data_shards import Sample, open_set, pack_images
from training.checkpoint import checkpoint_hash
from training.recipe import TrainingRecipe
from training.snapshots import Snapshots
from training.world import World

SIZE, IMAGES = 32, 2048
WAYS = ("none", "background", "in the step")


def make_set(folder: Path) -> None:
    rng = np.random.default_rng(0)
    samples = [Sample(f"noise-{i:04d}", rng.integers(0, 256, (1, SIZE, SIZE), np.uint8), 0, "train") for i in range(IMAGES)]
    pack_images(samples, folder, name="noise", shape=(1, SIZE, SIZE), classes=["noise"], shard_samples=128)


def recipe_of(root: Path, options: argparse.Namespace, way: str) -> TrainingRecipe:
    last = options.steps * options.batch
    engine = {"kind": "torch"} if options.zero < 0 else {"kind": "deepspeed", "zero": options.zero}
    return TrainingRecipe.model_validate({
        "name": "checkpoint", "data": {"source": "source", "root": str(root)}, "wandb": {"mode": "disabled"},
        "training": {"images": last, "batch": options.batch, "generator": {"channels": options.channels},
                     "discriminator": {"channels": options.channels}, "engine": engine,
                     "report_every_images": options.batch * (options.steps // 8),
                     "snapshot_every_images": last if way == "none" else options.every * options.batch}})


def measured(world: World, root: Path, options: argparse.Namespace, way: str, run: Path) -> None:
    """Train once; rank 0 leaves its figures in ``run/figures.json``."""
    from training.pretrain import pretrain

    stalled = [0.0]
    real = Snapshots.save

    def save(self: Snapshots, *given: Any, **named: Any) -> None:
        real(self, *given, **named)
        if way == "in the step":
            began = time.monotonic()
            self.wait()
            self.stalled_s += time.monotonic() - began
        stalled[0] = self.stalled_s

    Snapshots.save = save  # type: ignore[method-assign]
    reports: list[float] = []
    last = pretrain(recipe_of(root, options, way), open_set(root / "source"), run, world,
                    lambda images, metrics: reports.append(time.monotonic()))
    if world.rank == 0:
        (run / "figures.json").write_text(json.dumps({
            "seconds": reports[-1] - reports[0], "stalled_s": stalled[0], "hash": checkpoint_hash(last)}))


def rank_main(rank: int, root: Path, options: argparse.Namespace, way: str, run: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(options.ranks))  # as every launcher does
    if options.ranks > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{run}.group", rank=rank, world_size=options.ranks)
    measured(World(rank, options.ranks), root, options, way, run)
    if options.ranks > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--zero", type=int, default=2, help="DeepSpeed's ZeRO stage; -1 is the plain engine")
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1024)
    parser.add_argument("--every", type=int, default=512, help="steps between two checkpoints; the default recipe's")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="graft-checkpoint-"))
    try:
        make_set(root / "source")
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for repeat in range(options.repeats):
            for way in WAYS:
                run = root / f"{way.replace(' ', '-')}-{repeat}"
                spawn(rank_main, args=(root, options, way, run), nprocs=options.ranks)
                found[way].append(json.loads((run / "figures.json").read_text()))
                shutil.rmtree(run)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    assert len({one["hash"] for runs in found.values() for one in runs}) == 1, "checkpoints changed the result"
    seconds = {way: statistics.median(one["seconds"] for one in runs) for way, runs in found.items()}
    figures = {
        "ranks": options.ranks, "zero": options.zero, "channels": options.channels, "batch": options.batch,
        "steps": options.steps, "checkpoint_every_steps": options.every, "repeats": options.repeats,
        "step_ms": round(1000 * seconds["none"] / options.steps * 8 / 7, 2),
        "seconds": {way: round(value, 3) for way, value in seconds.items()},
        "all_seconds": {way: [round(one["seconds"], 3) for one in runs] for way, runs in found.items()},
        "cost_of_checkpoints": {way: round(seconds[way] / seconds["none"] - 1, 4) for way in WAYS[1:]},
        "waited_for_by_a_step": {way: round(statistics.median(one["stalled_s"] for one in found[way]) / seconds["none"], 4)
                                 for way in WAYS[1:]}}
    print(json.dumps(figures, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
