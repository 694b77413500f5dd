"""Score a checkpoint, or a folder of generated images, against a set of shards."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_shards import ShardSet, load_images
from data_shards.errors import BadImage, UserError
from data_shards.images import fit_image, open_image
from data_shards.sources import Options, open_source
from training.checkpoint import checkpoint_hash, versions
from training.config import content_id
from training.draws import generator as draw
from training.draws import latents
from training.families import FAMILIES
from training.metrics.catalogue import SCORES, Images, Material, check_names, compute_scores
from training.metrics.copying import nearest_support
from training.metrics.extraction import MapFn, image_features, moments_of, set_features, set_moments
from training.metrics.features import FeatureNet
from training.metrics.score import contract
from training.pictures import generate, in_turn, save_grid
from training.sample import averaged_generator
from training.target import support_indices
from training.world import device

SCHEMA_VERSION = 1
LIMIT = 5000  # images of each set, at most, but for the Frechet distance's reference: many scores cost its square
GALLERY = 8  # pairs

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Fakes:
    """Generated images and where they come from."""

    images: Tensor  # uint8 (N, C, H, W)
    origin: dict[str, Any]  # JSON-ready
    labels: tuple[str, ...] | None = None  # each image's class
    generate: Callable[[Tensor], Tensor] | None = None  # latents -> float images
    latent_dim: int = 0
    support: dict[str, Any] = field(default_factory=dict)  # of a trial: shots, seed, and the set's hash


def of_checkpoint(folder: Path, samples: int, seed: int) -> Fakes:
    """``samples`` images of a checkpoint's averaged generator; the same seed draws the same latents.

    Raises:
        UserError: when the checkpoint is damaged or is no generator's.
    """
    network, recipe, state = averaged_generator(folder)
    if FAMILIES[recipe.training.family].drawn:
        raise UserError(f"{folder} makes no pictures but what the family {recipe.training.family} does, of which there are no "
                        "scores here; its metrics log has the likelihood.")
    latent_dim = recipe.training.generator.latent_dim
    images = generate(network, latents(seed, "evaluation", 0, samples, latent_dim))
    told = in_turn(network, samples)

    def make(z: Tensor) -> Tensor:
        given, labels = z.to(device()), in_turn(network, len(z))
        found: Tensor = network(given) if labels is None else network(given, labels.to(given.device))
        return found

    row = folder.parent / "row.json"
    trial = json.loads(row.read_text()) if row.is_file() else {}
    support = {"shots": trial["shots"], "seed": trial["seed"]} if trial else {}
    if trial.get("contract"):
        support["set"] = trial["contract"]["reference_hash"]
    return Fakes(images, {"kind": "checkpoint", "path": str(folder), "sha256": checkpoint_hash(folder),
                          "images_seen": state["images"], "seed": seed},
                 labels=tuple(state["classes"][label] for label in told.tolist()) if told is not None and state.get("classes")
                 else None, generate=make, latent_dim=latent_dim, support=support)


def of_images(path: Path, image_shape: tuple[int, int, int], samples: int | None, seed: int) -> Fakes:
    """The images of a folder (or zip, tar, array file), fitted to ``image_shape``; a random ``samples`` of them.

    Raises:
        UserError: for no images, or one that cannot be read, naming it.
    """
    with tempfile.TemporaryDirectory(prefix="graft-images-") as scratch:
        source = open_source(path, Options(Path(scratch)))
        if source.stage is not None:
            source = source.stage(Path(scratch), map)
        chosen = np.arange(len(source))
        if samples is not None and samples < len(source):
            order = torch.randperm(len(source), generator=draw(seed, "evaluated images", 0)).numpy()
            chosen = np.sort(order[:samples])
        part = source.part(chosen)
        images = np.empty((len(chosen), *image_shape), np.uint8)
        try:
            for number, name in enumerate(part.names):
                try:
                    images[number] = _fitted(part.read(number), image_shape)
                except BadImage as error:
                    raise UserError(f"{path} holds {name}, which is no image to score: {error}; take it out.") from error
        finally:
            part.close()
        labels = [source.classes[label] if label >= 0 else "" for label in source.labels[chosen].tolist()]
    pixels = torch.from_numpy(images)
    origin = {"kind": source.kind, "path": str(path), "sha256": content_id(source.fingerprint, chosen.tolist(), length=64)}
    return Fakes(pixels, origin, tuple(labels) if all(labels) else None)


def evaluate(fakes: Fakes, against: ShardSet, net: FeatureNet, *, scores: Sequence[str] = (), seed: int = 0,
             limit: int = LIMIT, map_fn: MapFn = map, threads: int = 1, gallery: Path | None = None,
             progress: Progress | None = None) -> dict[str, Any]:
    """Scores of ``fakes`` against a set, with the contract under which they may be compared; JSON-ready.

    The yardstick is the set's reference split, and its training split is what the generator is taken to have been trained
    on (of a trial's checkpoint, on its own target: its support images). A set without a reference split is its own
    yardstick, and scores that need images the generator has not seen are left out.

    Args:
        fakes: what is scored.
        against: the set; its images must have the fakes' shape.
        net: the feature net.
        scores: keys of `SCORES`; all that can be computed when empty.
        seed: of everything random in the scores.
        limit: most images of a split, drawn at random, for all but the Frechet distance, which takes the whole reference.
        map_fn: computes the set's features over workers, see `extraction`.
        threads: CPU threads of the classifiers that a score trains.
        gallery: PNG of the fakes nearest to a training image, above, and these images, below.
        progress: called with the share done and what is next.

    Raises:
        UserError: for an unknown score, one that cannot be computed, or images of another shape.
    """
    check_names(scores)
    say = progress or (lambda _share, _next: None)
    shape = tuple(fakes.images.shape[1:])
    if shape != against.manifest.image_shape:
        raise UserError(f"the generated images have shape {shape} and those of {against.place} {against.manifest.image_shape}; "
                        "give a set of the generator's own shape.")
    held = against.manifest.splits.get("reference", 0) > 0
    reference_ids = against.indices("reference" if held else "train")
    training_ids = _training_ids(fakes, against)
    say(0.0, "reference features")
    some = _some(reference_ids, limit, seed)
    reference = _load(against, some, net, map_fn)
    whole = moments_of(reference.features) if len(some) == len(reference_ids) else set_moments(
        against.place, reference_ids, net, map_fn)
    say(0.2, "training features")
    same = np.array_equal(training_ids, reference_ids)
    training = reference if same else _load(against, _some(training_ids, limit, seed), net, map_fn)
    say(0.3, "generated features")
    fake = Images(fakes.images, image_features(fakes.images, net), _labels(fakes, against.manifest.classes))
    material = Material(net, seed, fake, reference, whole, against.manifest.classes, training, reference if held else None,
                        fakes.generate, fakes.latent_dim, threads)
    count = len(scores) or len(SCORES)
    values, skipped = compute_scores(material, scores, progress=lambda done, name: say(0.4 + 0.6 * min(done / count, 1), name))
    if gallery is not None:
        save_gallery(fake, training, gallery)
    say(1.0, "done")
    agreed = contract(net, against.manifest.sha256, len(fake.images), len(reference_ids),
                      versions().get("graft-gan", "unknown"))
    return {"schema_version": SCHEMA_VERSION, "of": fakes.origin,
            "against": {"set": against.manifest.name, "place": against.place, "split": "reference" if held else "train"},
            "contract": {**agreed, "n_reference_compared": len(some), "n_training": len(training.images),
                         "seed": seed},
            "scores": values, "skipped": skipped}


def save_gallery(fake: Images, training: Images, path: Path) -> None:
    """The generated images that lie nearest to a training image, above, each with that image below, nearest first."""
    nearest, distances = nearest_support(fake.features, training.features)
    order = distances.argsort()[:GALLERY]
    save_grid(torch.cat([fake.images[order], training.images[nearest[order]]]), path, columns=len(order))


def _load(against: ShardSet, ids: np.ndarray, net: FeatureNet, map_fn: MapFn) -> Images:
    images, labels = load_images(against, ids)
    return Images(images, set_features(against.place, ids, net, map_fn), labels)


def _training_ids(fakes: Fakes, against: ShardSet) -> np.ndarray:
    """The support images of a trial on this very set, else the whole training split."""
    if fakes.support.get("set") == against.manifest.sha256:
        return np.sort(np.asarray(support_indices(against, fakes.support["shots"], fakes.support["seed"]), np.int64))
    return against.indices("train")


def _some(ids: np.ndarray, limit: int, seed: int) -> np.ndarray:
    if len(ids) <= limit:
        return ids
    return np.sort(ids[torch.randperm(len(ids), generator=draw(seed, "compared images", 0)).numpy()[:limit]])


def _labels(fakes: Fakes, classes: tuple[str, ...]) -> Tensor:
    names = fakes.labels or ()
    number = {name: index for index, name in enumerate(classes)}
    known = [number.get(name, -1) for name in names] or [-1] * len(fakes.images)
    return torch.tensor(known, dtype=torch.int64)


def _fitted(content: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """An item of a source as uint8 (C, H, W)."""
    content = content[0] if isinstance(content, tuple) else content
    if isinstance(content, np.ndarray):
        if content.shape != shape:
            raise BadImage(f"its shape is {content.shape}, not {shape}")
        return content
    image = open_image(content) if isinstance(content, bytes) else content
    return fit_image(image, (shape[1], shape[2]), shape[0])
