"""The sets that a run reads: fetched, opened and checked before anything is trained."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from cluster.progress import console, timed
from cluster.recipe import Recipe
from data_shards import DATASETS, ShardSet, fetch, open_set
from data_shards.errors import UserError
from data_shards.parts import check_shapes
from training.families import FAMILIES
from training.pretrain import check_classes
from training.source import domain_b, set_place, source_parts, source_sets
from training.target import for_target, load_target


def named_sets(recipe: Recipe) -> list[str]:
    """The sets that a run reads."""
    encoder = [recipe.evaluation.encoder_source] if recipe.evaluation.encoder_source else []
    return [*source_sets(recipe.data), *encoder, *(target.set for target in recipe.fanout.targets)]


def missing_sets(recipe: Recipe) -> dict[str, set[str]]:
    """The recipe's sets that are not there, by the dataset that has them.

    Raises:
        UserError: for a set that is neither there nor part of a known dataset.
    """
    missing: dict[str, set[str]] = {}
    for name in named_sets(recipe):
        place = set_place(recipe.data, name)
        if "://" not in place and not (Path(place) / "manifest.json").exists():
            dataset = name.partition("/")[0]
            if dataset not in DATASETS:
                raise UserError(f"there is no set at {place}: pack one with `graft shards pack FOLDER --out "
                                f"{Path(recipe.data.root) / name}`, or name one of the datasets {', '.join(DATASETS)}.")
            missing.setdefault(dataset, set()).add(name)
    return missing


def absent(recipe: Recipe) -> Iterator[str]:
    """What a run would do first about its sets, in words."""
    missing = missing_sets(recipe)
    for dataset, wanted in missing.items():
        yield f"  shards    {', '.join(sorted(wanted))} not in {recipe.data.root}; would be fetched ({dataset})"
    if not missing:
        yield f"  shards    all sets are in {recipe.data.root}"


def ready_sets(recipe: Recipe) -> ShardSet:
    """Fetch the known datasets that are not there yet and check every set that the recipe names; returns the source.

    Raises:
        UserError: for a set that is neither there nor part of a known dataset, and what `check_sets` says.
    """
    for dataset, wanted in missing_sets(recipe).items():
        console.print(f"shards    fetching {', '.join(sorted(wanted))}")
        with timed(None, "shards"):
            fetch(dataset, recipe.data.root, only=wanted)
    source = check_sets(recipe)
    assert source is not None
    return source


def check_sets(recipe: Recipe, missing: Collection[str] = ()) -> ShardSet | None:
    """Open every set of the recipe but those in ``missing``, and see whether they suit it and each other; returns the source.

    Raises:
        UserError: for classes, labels, shapes or sizes that the recipe cannot be run on.
    """
    source = None
    if not set(source_sets(recipe.data)) & set(missing):
        source = open_set(set_place(recipe.data, recipe.data.source))
        check_classes(recipe, source)
        check_shapes(source_parts(recipe.data, source))
        domain_b(recipe.data, source)
        taught = recipe.evaluation.encoder_source or recipe.data.source
        if taught not in missing and (recipe.fanout.targets or recipe.evaluation.during_pretraining):
            encoder_set(recipe, source)
    for target in recipe.fanout.targets:
        if target.set in missing:
            continue
        load_target(set_place(recipe.data, target.set), recipe.adaptation.shots, recipe.seed)
        images = open_set(set_place(recipe.data, target.set))
        for_target(recipe, images)
        shape = images.manifest.image_shape
        if source and shape != source.manifest.image_shape:
            raise UserError(f"the target set {target.set} has images of shape {shape} and the source "
                            f"{source.manifest.image_shape}; pack it with the source's --size and --channels.")
    return source


def encoder_set(recipe: Recipe, source: ShardSet) -> ShardSet | None:
    """The labelled set that the run's encoder learns from; None for a run that trains none.

    Raises:
        UserError: for a set of another shape than the source's, or with images without a label.
    """
    if recipe.evaluation.net != "encoder" or FAMILIES[recipe.training.family].drawn:
        return None
    named = recipe.evaluation.encoder_source
    taught = open_set(set_place(recipe.data, named)) if named else source
    if taught.manifest.image_shape != source.manifest.image_shape:
        raise UserError(f"evaluation.encoder_source = {named} has images of shape {taught.manifest.image_shape} and the source "
                        f"{source.manifest.image_shape}; name a set of the source's shape.")
    if (taught.samples["label"][taught.indices()] < 0).any():
        raise UserError(f"the set {taught.place} has images without a label, and the encoder of all scores learns from labels; "
                        "name a labelled set of the source's shape in evaluation.encoder_source, give "
                        "--set evaluation.net=inception, or pack it with one subfolder per class.")
    return taught
