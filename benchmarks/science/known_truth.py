"""Sources whose worth for a target is known beforehand: does the verdict say so, for every seed?

    python -m benchmarks.science.known_truth [--seeds N] [--again NET] [--data DIR] [--out DIR]

Targets: MNIST digits turned by 30 and by 90 degrees, 100 images to train on. Sources, by one recipe but for their name:

    digits   other digits, upright: fine-tuning must be positive
    noise    every pixel a fair coin, nothing of a digit in it: negative, since scratch has left noise behind at 1600 images
    fresh    no source at all, networks as they are made, by another seed than the control's: neutral but for the rate of false
             verdicts, 5 in 100. Each seed has fresh weights of its own: control and method differ by a draw and nothing else

For each run seed: pretraining, the plan of a fan-out, its trials over 10 seeds, Holm-corrected verdicts, all by the code of
`graft run`, in this process without Ray. The sources of a run seed have the control's trials in common. The feature net is a
classifier of further digits, turned as the targets are: the encoder that a run trains on its own source would know digits in
one run and nothing in the other, where noise has no classes. --again scores the trials of the first run seed in a further net.
No digit is in two sets. The program fails if a verdict is wrong, or if more of the fresh ones have one than chance allows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import rotate
from scipy.stats import binom

from cluster.fanout import Board
from cluster.leaderboard import contract_of, verdicts_over
from cluster.recipe import Recipe
from data_shards import Sample, ShardSet, fetch, load_images, open_set, pack_images
from training.checkpoint import checkpoint_hash, save_checkpoint
from training.draws import generator as draw
from training.metrics.encoder import save_encoder, train_encoder
from training.networks import make_networks
from training.pretrain import finished_pretraining, pretrain
from training.source import set_place
from training.trial import Trial, rescore, run_trial
from training.world import World
from tune_spaces.config import TargetConfig
from tune_spaces.plan import Start, races

TRUTH = {"digits": "positive", "noise": "negative", "fresh": "neutral"}
STRIDE = 100  # between run seeds: a run's trials have the seeds after its own, and no two runs share one
FRESH = 1_000_000  # added to a trial's seed: the seed of the weights that stand for a source's
CHANCE = 0.01  # so rarely may a right program be called wrong for its false verdicts


@dataclass(frozen=True)
class Form:
    """Sizes of the experiment, in images where nothing else is said."""

    degrees: tuple[int, ...] = (30, 90)
    source: int = 20_000
    encoder: int = 20_000  # digits of the feature net's training
    encoder_images: int = 40_000  # seen by it
    pool: int = 500
    reference: int = 500
    channels: int = 16
    pretraining: int = 61_440  # seen by it
    shots: int = 100
    images: int = 1600  # seen by a trial
    samples: int = 300
    seeds: int = 10  # of a verdict


def recipe_of(form: Form, root: Path, source: str, seed: int) -> Recipe:
    """The recipe over the sets of `make_sets` in ``root``; nothing but the source's name and the seed differs between runs."""
    adam = {"channels": form.channels, "lr": 1e-3}
    return Recipe.model_validate({
        "name": f"{source}-{seed}", "seed": seed, "data": {"source": source, "root": str(root)},
        "training": {"images": form.pretraining, "batch": 32, "engine": {"kind": "torch"},
                     "generator": {"latent_dim": 32, **adam}, "discriminator": adam, "objective": {"r1": 5.0, "r2": 5.0},
                     "report_every_images": form.pretraining // 4, "snapshot_every_images": form.pretraining,
                     "health": {"every_images": 0}},
        "adaptation": {"shots": form.shots, "batch": 16, "images": form.images, "lr": 5e-4, "r1": 5.0, "r2": 5.0,
                       "ema_halflife_images": 200},
        "evaluation": {"net": str(root / "encoder.safetensors"), "samples": form.samples},
        "fanout": {"targets": [{"set": domain(each)} for each in form.degrees], "methods": ["scratch", "finetune"],
                   "candidates": 1, "rungs": 1, "seeds": form.seeds},
        "wandb": {"mode": "disabled"}})


def domain(degrees: int) -> str:
    return f"turned-{degrees}"


def turned(images: np.ndarray, degrees: int) -> np.ndarray:
    """uint8 (N, C, S, S) turned counterclockwise about their middle, black where nothing was."""
    found = rotate(images.astype(np.float32), degrees, axes=(3, 2), reshape=False, order=1)
    return found.round().clip(0, 255).astype(np.uint8)


def coins(count: int, shape: Sequence[int]) -> np.ndarray:
    """uint8 (count, *shape), every pixel black or white with the same chance."""
    return np.random.RandomState(0).randint(0, 2, (count, *shape)).astype(np.uint8) * 255


def make_sets(digits: ShardSet, root: Path, form: Form) -> None:
    """Pack sources and targets into ``root``, and train the feature net, of digits that are all different."""
    order = torch.randperm(len(digits), generator=draw(0, "digits", 0)).numpy()
    each = form.pool + form.reference
    sizes = [form.source, form.encoder, *[each] * len(form.degrees)]
    assert sum(sizes) <= len(digits)
    parts = [order[end - size:end] for size, end in zip(sizes, np.cumsum(sizes), strict=True)]

    def pack(name: str, images: np.ndarray, labels: Iterable[int], pool: int) -> None:
        if not (root / name / "manifest.json").exists():
            samples = [Sample(f"{i:05d}", image, int(label), "train" if i < pool else "reference")
                       for i, (image, label) in enumerate(zip(images, labels, strict=True))]
            pack_images(samples, root / name, name=name, shape=digits.manifest.image_shape, classes=digits.manifest.classes,
                        licence=digits.manifest.licence)

    images, labels = load_images(digits, parts[0])
    pack("digits", images.numpy(), labels.tolist(), form.source)
    pack("noise", coins(form.source, digits.manifest.image_shape), [-1] * form.source, form.source)
    for degrees, ids in zip(form.degrees, parts[2:], strict=True):
        images, labels = load_images(digits, ids)
        pack(domain(degrees), turned(images.numpy(), degrees), labels.tolist(), form.pool)
    net = root / "encoder.safetensors"
    if not net.exists():
        images, labels = load_images(digits, parts[1])
        shares = np.array_split(images.numpy(), len(form.degrees))
        seen = np.concatenate([turned(share, degrees) for share, degrees in zip(shares, form.degrees, strict=True)])
        save_encoder(train_encoder(torch.from_numpy(seen), labels, classes=len(digits.manifest.classes), seed=0,
                                   images_budget=form.encoder_images, threads=1), net)


def judged_rows(recipe: Recipe, out: Path) -> list[dict[str, Any]]:
    """Pretrain and fan out in ``out``, or go on there; the rows of all trials, the control's among them."""
    source, folder = open_set(set_place(recipe.data, recipe.data.source)), out / recipe.data.source
    pretrained = finished_pretraining(recipe, source, folder / "pretrain") or pretrain(recipe, source, folder, World())
    start = Start("pretrain", str(pretrained), checkpoint_hash(pretrained))
    board = Board(recipe, out, races(recipe, recipe.fanout, {"pretrain": start}))
    while job := board.next_job():
        board.report(job, run_trial(job.trial, recipe, out, until=job.until))
    return board.plan_rows()


def fresh_rows(recipe: Recipe, out: Path) -> list[dict[str, Any]]:
    """The rows of the control and of fine-tuning from fresh networks, for the targets and seeds of the recipe's fan-out."""
    return [row for target in recipe.fanout.targets for i in range(recipe.fanout.seeds)
            for row in fresh_pair(recipe, out, target, recipe.seed + 1 + i, FRESH)]


def fresh_pair(recipe: Recipe, out: Path, target: TargetConfig, seed: int, further: int) -> list[dict[str, Any]]:
    """The rows of the control and of fine-tuning under one trial's seed, from fresh networks of the seed ``seed + further``."""
    place, start = set_place(recipe.data, target.set), out / "fresh" / str(seed + further)
    if not (start / "state.json").exists():
        shape = open_set(place).manifest.image_shape
        networks = make_networks(recipe.training, shape, seed + further)
        save_checkpoint(start, {"generator_ema": networks["generator"].state_dict(),
                                "discriminator": networks["discriminator"].state_dict()},
                        {"images": 0, "recipe": recipe.model_dump(mode="json"), "image_shape": list(shape)})
    control = Trial(target.domain, place, "scratch", seed, "final", "scratch", None, None)
    method = replace(control, method="finetune", start="pretrain", checkpoint=str(start),
                     checkpoint_sha256=checkpoint_hash(start))
    return [run_trial(trial, recipe, out, until=recipe.adaptation.images) for trial in (control, method)]


def run(digits: ShardSet, out: Path, form: Form, seeds: int, again: str = "") -> list[dict[str, Any]]:
    """Every verdict, with its source, run seed, net and truth beside, in the order in which they were made."""
    root = out / "sets"
    make_sets(digits, root, form)
    rows: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for seed in range(0, STRIDE * seeds, STRIDE):
        for source, truth in TRUTH.items():
            recipe, folder = recipe_of(form, root, "digits" if source == "fresh" else source, seed), out / f"seed-{seed}"
            made = (fresh_rows if source == "fresh" else judged_rows)(recipe, folder)
            rows += made
            contract_of(rows)  # refuses what was not scored in one and the same way, whatever the source
            found += judged(made, recipe, source=source, seed=seed, net="encoder", truth=truth)
            if again and seed == 0:
                scored = [rescore(row, recipe, folder, set_path=set_place(recipe.data, row["domain"]), net=again)
                          for row in made if row["phase"] == "final"]
                found += judged(scored, recipe, source=source, seed=seed, net=again, truth=truth)
    return found


def judged(rows: Sequence[Mapping[str, Any]], recipe: Recipe, **about: Any) -> list[dict[str, Any]]:
    """The verdicts over one source's rows, each printed, with ``about`` and the control's KID beside."""
    contract_of(rows)
    verdicts = verdicts_over(rows, 1 - recipe.fanout.confidence)
    control = {verdict["domain"]: verdict["kid_mean"] for verdict in verdicts if verdict["method"] == "scratch"}
    found = [{**about, "kid_scratch": control[verdict["domain"]], **verdict} for verdict in verdicts
             if verdict["method"] != "scratch"]
    print("\n".join(map(line, found)), flush=True)
    return found


def line(verdict: Mapping[str, Any]) -> str:
    """One verdict as a row of a Markdown table."""
    low, high = verdict["gain_ci95"]
    cells = [verdict["source"], verdict["domain"], str(verdict["seed"]), verdict["net"], f"{verdict['kid_scratch']:.2f}",
             f"{verdict['kid_mean']:.2f}", f"{verdict['gain_over_scratch']:+.2f} [{low:.2f}, {high:.2f}]", verdict["verdict"]]
    return f"| {' | '.join(cells)} |"


HEAD = f"| source | domain | run seed | net | KID scratch | KID fine-tuned | gain [95 %] | verdict |\n{'|---' * 8}|"


def wrong(verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    """What speaks against the verdicts, a sentence each; none where all is as it must be."""
    said = [f"{each['source']}, seed {each['seed']}, {each['domain']}, {each['net']}: {each['verdict']}, not {each['truth']}."
            for each in verdicts if each["truth"] != "neutral" and each["verdict"] != each["truth"]]
    fresh = [each for each in verdicts if each["truth"] == "neutral"]
    false = sum(each["verdict"] != "neutral" for each in fresh)
    if fresh and binom.sf(false - 1, len(fresh), 0.05) < CHANCE:
        said.append(f"{false} of {len(fresh)} fresh sources have a verdict, where 5 % may.")
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="run seeds, each with a pretraining of its own on each source")
    parser.add_argument("--again", default="", metavar="NET", help="a net in which the first run seed's trials are scored too")
    parser.add_argument("--data", type=Path, default=Path("data"), help="where MNIST is, or is fetched to")
    parser.add_argument("--out", type=Path, default=Path("runs/science/known_truth"), help="folder of runs and verdicts")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    digits = fetch("mnist", chosen.data, only={"mnist/source"}).sets["mnist/source"]
    chosen.out.mkdir(parents=True, exist_ok=True)
    print(HEAD, flush=True)
    verdicts = run(digits, chosen.out.resolve(), Form(), chosen.seeds, chosen.again)
    said = wrong(verdicts)
    (chosen.out / "verdicts.json").write_text(json.dumps({"verdicts": verdicts, "wrong": said}, indent=1) + "\n")
    for source, truth in TRUTH.items():
        mine = [each["verdict"] for each in verdicts if each["source"] == source]
        print(f"{source:<7} is {truth}; of {len(mine)} verdicts "
              + ", ".join(f"{mine.count(sign)} {sign}" for sign in ("positive", "neutral", "negative")))
    for sentence in said:
        print(sentence, file=sys.stderr)
    return int(bool(said))


if __name__ == "__main__":
    raise SystemExit(main())
