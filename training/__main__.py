"""``python -m training RECIPE [--set KEY=VALUE]... [--out DIR]``: pretraining without Ray, alone or under torchrun."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from data_shards import UserError, open_set
from data_shards.errors import Failure
from training.checkpoint import NotWritten
from training.config import parse_overrides
from training.cost import cost_line
from training.events import read_events
from training.families import FAMILIES
from training.folders import inside, run_folder
from training.health import Unhealthy
from training.loop import NonFinite
from training.pretrain import Progress, finished_pretraining, pretrain
from training.recipe import TrainingConfig, TrainingRecipe, per_worker_batch, read_recipe
from training.source import set_place
from training.stopping import STOP_FILE, Stopped
from training.world import current_world, from_rank_0, join_world, leave_world, lost_peer


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training", description="Pretrain a recipe's source model without Ray.",
                                     epilog="example: torchrun --nproc-per-node 2 -m training recipes/smoke.yaml")
    parser.add_argument("recipe", help="a recipe file, or a name in recipes/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one value of the recipe")
    parser.add_argument("--out", help="the run's folder, or its URL in an object store (default runs/<recipe name>)")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s %(message)s")
    logging.getLogger("graft").setLevel(logging.INFO)
    try:
        recipe = read_recipe(TrainingRecipe, options.recipe, parse_overrides(options.set))
        source = open_set(set_place(recipe.data, recipe.data.source))
        world = join_world()
        run = run_folder(f"runs/{recipe.name}" if options.out is None else options.out)
        folder = inside(run, "pretrain")
        done = from_rank_0(lambda: str(finished_pretraining(recipe, source, folder) or ""), world)
        if done:
            if world.rank == 0:
                print(f"already trained: {done}")
            leave_world(world)
            return 0
        if world.rank == 0:
            each = per_worker_batch(recipe.training.batch, world.size, recipe.data.streams)
            print(f"{world.size} workers x {each} images = global batch {recipe.training.batch}")
            if isinstance(folder, Path):
                _ready(folder)
        checkpoint = pretrain(recipe, source, run, world, progress_line(recipe.training))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        leave_world(current_world())  # on all ranks alike
        return 2
    except Failure as failure:
        print(failure, file=sys.stderr)
        if isinstance(failure, Stopped | NonFinite | NotWritten | Unhealthy):  # on all ranks alike
            leave_world(world)
        return 1
    except RuntimeError as error:
        if world.size == 1 or not lost_peer(error):
            raise
        print(f"another rank was lost; the same command goes on from the last checkpoint in {folder}", file=sys.stderr,
              flush=True)
        os._exit(1)  # what is left of the group cannot be left in order
    if world.rank == 0:
        print(cost_line(read_events(inside(folder, "events.jsonl")), recipe.training.batch))
        print(f"checkpoint: {checkpoint}")
    leave_world(world)
    return 0


def _ready(folder: Path) -> None:
    """Make the folder, and take away the order to stop that a process which was killed left there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STOP_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror}); give another --out.") from error


def progress_line(config: TrainingConfig) -> Progress:
    """A progress callback that prints one line per report."""
    total, family = config.images, FAMILIES[config.family]

    def show(images: int, metrics: dict[str, float]) -> None:
        rate = metrics["images_per_second"]
        print(f"{images:>9}/{total} images  {rate:6.1f} images/s  {family.line(metrics)}  "
              f"{max(total - images, 0) / rate / 60:.1f} min left", flush=True)

    return show


if __name__ == "__main__":
    sys.exit(main())
