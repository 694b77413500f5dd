"""CycleGAN on digits whose translation is known, inversion: does a classifier read what it translates?

    python -m benchmarks.science.translation [--seeds N] [--images N] [--data DIR] [--out FILE]

Domain A is MNIST, domain B other digits of it, black on white; no digit is in both. The translator is trained through the
recipe as any other, and translates digits that it has not seen. A classifier that was trained on real digits of domain B reads
them. Nothing tells the translator which digit is which, and the cycle allows it to exchange them. Beside it: what the
classifier reads of real digits of B, and of the digits before their translation.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_shards import ShardSet, fetch, load_images, open_set, pack_arrays
from training.draws import generator as draw
from training.metrics.classification import small_classifier
from training.pretrain import pretrain
from training.recipe import TrainingRecipe
from training.sample import translate_grid, translate_shards
from training.world import World

EACH, TESTED = 5000, 2000  # digits of each domain, and digits that are translated and read


def tree(root: Path, seed: int, images: int) -> dict[str, Any]:
    """The recipe over the sets ``root/a`` and ``root/b``: networks for CPUs, the paper's weights but for the identity loss.

    That is there to keep colours, which here are what is to change: with it a translator turned the margin only, by which
    zeros became ones (docs/LOG.md).
    """
    adam = {"lr": [[0, 1e-3], [images // 2, 1e-3], [images, 0.0]], "betas": [0.5, 0.999]}
    return {
        "name": "digits", "seed": seed, "data": {"source": "a", "translate_to": "b", "root": str(root)},
        "training": {"family": "cyclegan", "images": images, "batch": 8,
                     "objective": {"loss": "least_squares", "r1": 0, "r2": 0},
                     "cyclegan": {"blocks": 1, "halvings": 2, "identity": 0.0},
                     "generator": {"channels": 8, **adam}, "discriminator": {"channels": 16, **adam},
                     "ema_halflife_images": 200, "report_every_images": max(images // 10, 8), "snapshot_every_images": images,
                     "health": {"every_images": 0}},
        "wandb": {"mode": "disabled"}}


def make_sets(digits: ShardSet, root: Path, seed: int, each: int, tested: int) -> tuple[Tensor, Tensor]:
    """Pack ``root/a``, ``root/b`` and the digits to be translated, ``root/test``, of digits that are all different.

    Returns:
        Images uint8 and labels of ``root/b``.
    """
    order = torch.randperm(len(digits), generator=draw(seed, "digits", 0)).numpy()
    parts = {"a": order[:each], "b": order[each:2 * each], "test": order[2 * each:2 * each + tested]}
    inside = torch.empty(0), torch.empty(0)
    for name, ids in parts.items():
        images, labels = load_images(digits, ids)
        if name == "b":
            inside = images, labels = 255 - images, labels
        pack_arrays(partial(_digit, images.numpy(), labels.numpy()), len(ids), root / name, name=name,
                    shape=digits.manifest.image_shape, identity=f"{seed} {name}", classes=digits.manifest.classes,
                    licence=digits.manifest.licence)
    return inside


def _digit(images: np.ndarray, labels: np.ndarray, number: int) -> tuple[np.ndarray, int]:
    return images[number], int(labels[number])


def run(seed: int, images: int, digits: ShardSet, root: Path, *, each: int = EACH, tested: int = TESTED,
        budget: int = 20_000) -> dict[str, float]:
    """Train one translator of ``images`` images in ``root``, and read its translations of ``tested`` digits.

    Args:
        budget: images that the classifier's training sees.

    Returns:
        Shares of digits read right: "translated", "real" (digits of B as they should be) and "untranslated"; and "seconds" of
        the translator's training.
    """
    read = small_classifier(10, seed=seed, images_budget=budget)(*make_sets(digits, root, seed, each, tested))
    started = time.monotonic()
    recipe = TrainingRecipe.model_validate(tree(root, seed, images))
    checkpoint = pretrain(recipe, open_set(root / "a"), root / "run", World())
    seconds = time.monotonic() - started
    test = open_set(root / "test")
    made = translate_shards(checkpoint, test, str(root / "made"))
    translate_grid(checkpoint, test, root / "grid.png", 32)
    given, labels = load_images(test, np.arange(tested))
    shown = {"translated": load_images(made, np.arange(tested))[0], "real": 255 - given, "untranslated": given}
    return {**{name: float((read(pictures) == labels).double().mean()) for name, pictures in shown.items()}, "seconds": seconds}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=3000, help="images of each domain that a translator's training sees")
    parser.add_argument("--data", type=Path, default=Path("data"), help="where MNIST is, or is fetched to")
    parser.add_argument("--out", type=Path, default=Path("runs/science/translation.json"),
                        help="every seed's shares; their grids are written beside it")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if not (chosen.data / "mnist" / "source" / "manifest.json").exists():
        fetch("mnist", chosen.data, only={"mnist/source"})
    digits = open_set(chosen.data / "mnist" / "source")
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, float]] = []
    for seed in range(chosen.seeds):
        with tempfile.TemporaryDirectory() as folder:
            found.append(run(seed, chosen.images, digits, Path(folder)))
            (chosen.out.parent / f"translation-{seed}.png").write_bytes((Path(folder) / "grid.png").read_bytes())
        print(f"seed {seed}: {', '.join(f'{name} {value:.3f}' for name, value in found[-1].items())}", flush=True)
        chosen.out.write_text(json.dumps({"images": chosen.images, "seeds": found}, indent=1))


if __name__ == "__main__":
    main()
