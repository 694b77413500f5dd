"""Stacked MNIST (Metz et al. 2017; Srivastava et al. 2017; Lin et al. 2018): which objective finds all of 1000 modes?

    python -m benchmarks.science.stacked_mnist [--images N] [--rows NAME ...] [--stacks N] [--judged N] [--out DIR]

A picture is three random digits of MNIST's training file, one in each colour channel, so that there are 1000 equal modes. graft
packs 128,000 of them and pretrains on the set: its DCGAN shape without batch statistics, 28 px. 26,000 samples of the averaged
generator are judged by a digit classifier trained here, channel by channel; every sample counts. "real": stacks of test digits.
A picture that shows no digit is counted as some digit all the same, so look at OUT/ROW/pretrain/samples.png too. A run that was
killed goes on. About 15 minutes for each row on one core that computes bf16 itself.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from data_shards import ShardSet, load_images, open_set, pack_arrays
from data_shards.datasets import fetch
from training.__main__ import progress_line
from training.checkpoint import images_of, step_folder, steps
from training.config import apply_overrides
from training.draws import latents
from training.metrics.encoder import Encoder, load_encoder, save_encoder, to_unit, train_encoder
from training.metrics.modes import label_modes
from training.pictures import generate
from training.pretrain import finished_pretraining, pretrain
from training.recipe import TrainingRecipe, resolve
from training.sample import averaged_generator
from training.world import World

STACKS, JUDGED = 128_000, 26_000  # of the VEEGAN and PacGAN papers
IMAGES = 640_000
POINTS = 8  # of the curve
CLASSIFIER_IMAGES = 240_000
DIGITS = 10
MODES = DIGITS**3
BORDER = 2  # pixels around MNIST's own 28 x 28 in graft's sets


def _recipe(images: int) -> dict[str, Any]:
    """Of the default row. The learning rates and the penalties fall over training."""
    lr = [[0, 1e-3], [images // 2, 1e-3], [images, 1e-4]]
    gamma = [[0, 1.0], [images // 2, 0.3]]
    return {
        "data": {"source": "stacked-mnist"},
        "training": {
            "images": images, "batch": 64, "threads": 1, "engine": {"kind": "torch"},
            "generator": {"channels": 64, "latent_dim": 128, "lr": lr},
            "discriminator": {"channels": 32, "lr": lr},
            "objective": {"r1": gamma, "r2": gamma},
            "ema_halflife_images": 10_000, "report_every_images": max(images // (4 * POINTS), 64),
            "snapshot_every_images": max(images // POINTS, 64), "keep_checkpoints": 10 * POINTS, "health": {"every_images": 0}},
        "wandb": {"mode": "disabled"}}


_PLAIN = {"training.objective.r1": 0.0, "training.objective.r2": 0.0,
          **{f"training.{network}.{key}": value for network in ("generator", "discriminator")
             for key, value in (("lr", 2e-4), ("betas", (0.5, 0.999)))}}  # DCGAN's
ROWS: dict[str, dict[str, Any]] = {
    "default": {},
    "minimax": _PLAIN | {"training.objective.loss": "minimax"},
    "non_saturating": _PLAIN | {"training.objective.loss": "non_saturating"},
}


@dataclass(frozen=True)
class Stacks:
    """Stack i: the digits ``chosen[i]`` (three numbers) of ``digits`` uint8 (N, 1, 28, 28), one in each channel."""

    digits: np.ndarray
    chosen: np.ndarray

    def __call__(self, number: int) -> tuple[np.ndarray, int]:
        """uint8 (3, 28, 28), and no label: what the digits are is not told."""
        return self.digits[self.chosen[number], 0], -1


def draw_stacks(digits: Tensor, count: int, seed: int) -> Stacks:
    """``count`` stacks of digits uint8 (N, 1, 32, 32), whose border is cut off."""
    inner = digits[:, :, BORDER:-BORDER, BORDER:-BORDER].contiguous().numpy()
    return Stacks(inner, np.random.RandomState(seed).randint(len(digits), size=(count, 3)))


def pack_stacks(digits: ShardSet, place: Path, count: int) -> ShardSet:
    """The set of ``count`` stacks at ``place``, made of all ``digits`` where it is not there yet."""
    if not (place / "manifest.json").exists():
        images = load_images(digits, digits.indices())[0]
        print(f"packing {count} stacks into {place}", flush=True)
        stacks = draw_stacks(images, count, 0)
        pack_arrays(stacks, count, place, name="stacked-mnist", shape=stacks(0)[0].shape,
                    identity=f"{digits.manifest.sha256} {count}", licence=digits.manifest.licence,
                    source=digits.manifest.source)
    return open_set(place)


def make_classifier(digits: ShardSet, path: Path, images: int) -> Encoder:
    """A classifier of ``digits``, trained on ``images`` of them or read from ``path``."""
    if not path.exists():
        print(f"training the digit classifier on {images} images", flush=True)
        seen, labels = load_images(digits, digits.indices())
        save_encoder(train_encoder(seen, labels, classes=DIGITS, seed=0, images_budget=images, threads=1), path)
    return load_encoder(path)


@torch.inference_mode()
def classify(classifier: Encoder, images: Tensor) -> Tensor:
    """Digits int64 (N,) of images uint8 (N, 1, 32, 32)."""
    return torch.cat([classifier.logits(to_unit(part)).argmax(1) for part in images.split(500)])


def judge(classifier: Encoder, stacks: Tensor) -> dict[str, float]:
    """Modes found of 1000 and KL(found | uniform) of stacks uint8 (N, 3, 28, 28): mode 100 a + 10 b + c of digits (a, b, c).

    A perfect sampler of N stacks has a KL of about 999 / 2N.
    """
    digits = classify(classifier, pad(stacks.flatten(0, 1).unsqueeze(1), [BORDER] * 4)).unflatten(0, (-1, 3))
    found = label_modes(digits @ torch.tensor([DIGITS**2, DIGITS, 1]), torch.ones(MODES))
    return {name: float(found[name]) for name in ("modes", "modes_tenth", "mode_kl")}


def curve(folder: Path, classifier: Encoder, judged: int) -> list[dict[str, float]]:
    """The scores of every checkpoint, in the order of images seen."""
    points = []
    for images in map(images_of, map(Path, steps(folder))):
        network, recipe, _ = averaged_generator(step_folder(folder, images))
        z = latents(recipe.seed, "judged", 0, judged, recipe.training.generator.latent_dim)
        points.append({"images": images, **judge(classifier, generate(network, z))})
        print(f"{images:>9} images: {points[-1]['modes']:.0f} modes, KL {points[-1]['mode_kl']:.3f}", flush=True)
    return points


def run(name: str, source: ShardSet, classifier: Encoder, out: Path, images: int, judged: int) -> dict[str, Any]:
    """Train a row, or go on with it, and judge its checkpoints; the seconds are those of training in this call."""
    recipe = resolve(TrainingRecipe, apply_overrides(_recipe(images), ROWS[name]), where=name)
    started = time.monotonic()
    if finished_pretraining(recipe, source, out / "pretrain") is None:
        pretrain(recipe, source, out, World(), progress_line(recipe.training))
    seconds = time.monotonic() - started
    return {"seconds": round(seconds), "curve": curve(out / "pretrain", classifier, judged)}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: the scores of each row's last checkpoint."""
    lines = ["| | images seen | modes of 1000 | KL | training, s |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        last = row["curve"][-1]
        lines.append(f"| {name} | {last['images']:,.0f} | {last['modes']:.0f} | {last['mode_kl']:.3f} | {row['seconds']} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=IMAGES, help="images seen by each row's training")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--stacks", type=int, default=STACKS, help="images of the training set")
    parser.add_argument("--judged", type=int, default=JUDGED, help="samples that are judged")
    parser.add_argument("--classifier-images", type=int, default=CLASSIFIER_IMAGES, help="images seen by the classifier")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of fetched sets")
    parser.add_argument("--out", type=Path, default=Path("runs/science/stacked_mnist"), help="folder of runs and scores")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    digits = fetch("mnist", chosen.data).sets
    source = pack_stacks(digits["mnist/source"], chosen.out / f"stacks-{chosen.stacks}", chosen.stacks)
    classifier = make_classifier(digits["mnist/source"], chosen.out / "digits.safetensors", chosen.classifier_images)
    tests = [load_images(digits[f"mnist/{d}"], digits[f"mnist/{d}"].indices("reference"))[0] for d in range(DIGITS)]
    right = sum(int((classify(classifier, images) == d).sum()) for d, images in enumerate(tests))
    print(f"the classifier reads {right} of {sum(map(len, tests))} test digits", flush=True)
    unseen = draw_stacks(torch.cat(tests), chosen.judged, 1)
    real = judge(classifier, torch.from_numpy(np.stack([unseen(i)[0] for i in range(chosen.judged)])))
    rows: dict[str, Any] = {"real": {"seconds": 0, "curve": [{"images": 0, **real}]}}
    for name in chosen.rows:
        print(f"== {name}", flush=True)
        rows[name] = run(name, source, classifier, chosen.out / name, chosen.images, chosen.judged)
        (chosen.out / "rows.json").write_text(json.dumps(rows, indent=1))
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    main()
