"""The family cyclegan: its losses by hand, two ranks as one, exact resume, translated sets, and what it refuses."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

import training.pretrain
from cluster.cli import main
from cluster.recipe import Recipe
from data_shards import UserError, load_images, open_set
from tests.ranks import run_ranks
from tests.toy import toy_set, toy_tree
from tests.training.models.make import pictures, stir
from training.checkpoint import latest_valid, load_checkpoint
from training.evaluation import of_checkpoint
from training.families import FAMILIES, Batch, Phase
from training.families.cyclegan import CycleganConfig, cyclegan_phases
from training.meta.metatrain import metatrain
from training.models.translation import PatchDiscriminators, Translators
from training.networks import make_networks
from training.objectives import OBJECTIVES
from training.pictures import to_uint8
from training.pretrain import pretrain
from training.recipe import TrainingRecipe
from training.sample import averaged_generator, translate_grid, translate_shards
from training.world import World

SHAPE = (1, 16, 16)
PLAIN = {"loss": "least_squares", "r1": 0, "r2": 0}
Weights = dict[str, dict[str, Tensor]]


def tree_of(root: Path, **training: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"family": "cyclegan", "objective": PLAIN, "batch": 12, "images": 48,
                             "cyclegan": {"blocks": 1, "halvings": 2, "history": 20}, **training}
    tree: dict[str, Any] = toy_tree(root, **given)
    tree["data"] |= {"translate_to": "other"}
    tree["meta"] = {}
    return tree


def recipe_of(root: Path, **training: Any) -> TrainingRecipe:
    return TrainingRecipe.model_validate(tree_of(root, **training))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    toy_set(tmp_path / "source")
    toy_set(tmp_path / "other", seed=3)
    return tmp_path


def networks() -> dict[str, Any]:
    torch.manual_seed(0)
    found = {"generator": Translators(SHAPE, 4, 1), "discriminator": PatchDiscriminators(SHAPE, 4, 2, 20)}
    for network in found.values():
        stir(network, scale=0.1)
    return found


def a_batch() -> Batch:
    draws = {f"discriminator history {name}": torch.rand(6, 2, dtype=torch.float64) for name in "ab"}
    return Batch(pictures(6, SHAPE, 1), torch.full((6,), -1), {}, {}, draws, images_b=pictures(6, SHAPE, 2))


def gradients(phase: Phase, found: dict[str, nn.Module], batch: Batch) -> tuple[dict[str, Tensor], list[Tensor]]:
    terms = phase.loss(found, phase.prepared(found, batch, World()))
    return terms, list(torch.autograd.grad(terms["total"], list(found[phase.network].parameters())))


@pytest.mark.parametrize("identity", [0.5, 0.0])
@pytest.mark.parametrize("loss", ["least_squares", "relativistic", "hinge"])
def test_the_generators_loss_is_the_papers_sum(loss: str, identity: float) -> None:
    """L_GAN(G, D_B) + L_GAN(F, D_A) + 10 L_cyc (Zhu et al. 2017, equation 3) + 5 L_identity, and its gradient."""
    found, batch = networks(), a_batch()
    g, f, judge = found["generator"].a_to_b, found["generator"].b_to_a, found["discriminator"]
    a, b = batch.images, batch.images_b
    assert b is not None
    objective = OBJECTIVES[loss].generator
    adversarial = objective(judge.b(b), judge.b(g(a))) + objective(judge.a(a), judge.a(f(b)))
    if loss == "least_squares":
        torch.testing.assert_close(2 * adversarial, (judge.b(g(a)) - 1).square().mean() + (judge.a(f(b)) - 1).square().mean())
    cycle = (f(g(a)) - a).abs().mean() + (g(f(b)) - b).abs().mean()
    same = (g(b) - b).abs().mean() + (f(a) - a).abs().mean()
    expected = 2 * adversarial + 10 * cycle + 10 * identity * same
    phase = cyclegan_phases(loss, CycleganConfig(identity=identity))[0]
    terms, found_gradients = gradients(phase, found, batch)
    torch.testing.assert_close(terms["total"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms["cycle"], cycle.detach())
    hand = torch.autograd.grad(expected, list(found["generator"].parameters()))
    for ours, theirs in zip(found_gradients, hand, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_the_discriminators_see_the_history_and_their_own_domain() -> None:
    found, batch = networks(), a_batch()
    judge, phase = found["discriminator"], cyclegan_phases()[1]
    for history in (judge.history_a, judge.history_b):
        history.images.copy_(pictures(20, SHAPE, 7))
        history.filled.fill_(20)
    before = {"a": judge.history_a.images.clone(), "b": judge.history_b.images.clone()}
    fakes = {"b": found["generator"].a_to_b(batch.images).detach(), "a": found["generator"].b_to_a(batch.images_b).detach()}
    prepared = phase.prepared(found, batch, World())
    for name, fake in fakes.items():
        for i, (exchanged, place) in enumerate(batch.uniforms[f"discriminator history {name}"]):
            expected = before[name][int(place * 20)] if exchanged < 0.5 else fake[i]
            torch.testing.assert_close(prepared.prepared[name][i], expected)
    terms = phase.loss(found, prepared)
    objective = OBJECTIVES["least_squares"].discriminator
    expected = sum(objective(network(images), network(prepared.prepared[name])) for name, network, images in
                   (("a", judge.a, batch.images), ("b", judge.b, batch.images_b)))
    torch.testing.assert_close(terms["total"], expected)


def test_micro_batches_are_the_batch() -> None:
    found, batch = networks(), a_batch()
    for phase in cyclegan_phases():
        copies = {name: type(network)(SHAPE, 4, *((1,) if name == "generator" else (2, 20)))
                  for name, network in found.items()}
        for name, network in copies.items():
            network.load_state_dict(found[name].state_dict())
        _, whole = gradients(phase, copies, batch)
        prepared = phase.prepared(found, batch, World())
        parts = [gradients(replace(phase, prepare=None), found, part)[1] for part in prepared.parts(3)]
        for expected, *split in zip(whole, *parts, strict=True):
            torch.testing.assert_close(torch.stack(split).mean(0), expected, rtol=1e-3, atol=1e-5)


def trained(world: World, root: str, name: str, training: dict[str, Any]) -> Weights:
    recipe = recipe_of(Path(root), **training)
    folder = pretrain(recipe, open_set(Path(root) / "source"), Path(root) / name, world)
    torch.distributed.barrier() if world.size > 1 else None
    return load_checkpoint(folder, ("generator", "discriminator"))[0]


@pytest.mark.parametrize("engine", [{"kind": "torch"}, {"kind": "deepspeed", "zero": 2},
                                    {"kind": "deepspeed", "zero": 3, "persistence_threshold": 0},
                                    {"kind": "torch", "accumulation": 2}])
def test_two_ranks_train_what_one_trains(root: Path, engine: dict[str, Any]) -> None:
    """The bound of SGD in DESIGN part 7: a difference of 1e-6 of the weights' norm, where they move by hundreds of times that;
    and the same history on both, which 48 images fill and exchange. The rate is small because the translators start at
    N(0, 0.02^2), where larger steps multiply rounding by ten each."""
    sgd = {name: {"channels": 4, "name": "sgd", "lr": 1e-5, "betas": (0.0, 0.0)} for name in ("generator", "discriminator")}
    one = trained(World(), str(root), "one", sgd)
    two = run_ranks(trained, 2, str(root), "two", {**sgd, "engine": engine})
    start = make_networks(recipe_of(root, **sgd).training, SHAPE, 0)
    assert int(one["discriminator"]["history_a.filled"]) == 20
    for found in two:
        for stem in ("generator", "discriminator"):
            parameters = dict(start[stem].named_parameters())
            ours, theirs, begun = (torch.cat([named[name].detach().flatten().double() for name in parameters])
                                   for named in (found[stem], one[stem], parameters))
            assert float((ours - theirs).norm()) <= 1e-6 * float(theirs.norm())
            assert float((theirs - begun).norm()) > 1e-4 * float(theirs.norm())
        for name in ("history_a.images", "history_b.images"):
            assert float((found["discriminator"][name] - one["discriminator"][name]).abs().max()) < 1e-5


class Cut(Exception):
    """Stands for a kill."""


def cut(recipe: TrainingRecipe, root: Path, at: int) -> None:
    """Pretrain into ``root/parts`` until the step that begins after ``at`` images."""
    patched = vars(training.pretrain)
    real = patched["batches"]

    def cutting(*given: Any, **named: Any) -> Iterator[Any]:
        for number, batch in enumerate(real(*given, **named)):
            if "rank" in named and named["images_seen"] + number * named["batch"] == at:
                raise Cut
            yield batch

    patched["batches"] = cutting
    try:
        pretrain(recipe, open_set(root / "source"), root / "parts", World())
    except Cut:
        return
    finally:
        patched["batches"] = real
    raise AssertionError("not cut")


def test_a_run_that_was_cut_off_is_bit_equal_to_one_that_was_not(root: Path) -> None:
    recipe = recipe_of(root, images=96, snapshot_every_images=24, report_every_images=36)
    expected = load_checkpoint(pretrain(recipe, open_set(root / "source"), root / "whole", World()))[0]
    for at in (24, 60):  # right after a checkpoint, and between two
        cut(recipe, root, at)
    found = load_checkpoint(pretrain(recipe, open_set(root / "source"), root / "parts", World()))[0]
    assert "history_b.images" in expected["discriminator"]
    for stem, named in expected.items():
        assert all(torch.equal(found[stem][name], value) for name, value in named.items()), stem


def test_the_second_set_is_read_in_an_order_of_its_own(root: Path) -> None:
    """Else two sets that were made of the same images would be trained on as pairs."""
    recipe = recipe_of(root)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"translate_to": "source", "held_back": 0})})
    orders: list[list[int]] = []
    patched = vars(training.pretrain)
    real = patched["batches"]

    def noting(*given: Any, **named: Any) -> Iterator[Any]:
        mine: list[int] = []
        if "rank" in named:
            orders.append(mine)
        for batch in real(*given, **named):
            mine += [zlib.crc32(image.numpy().tobytes()) for image in batch.images]
            yield batch

    patched["batches"] = noting
    try:
        pretrain(recipe, open_set(root / "source"), root / "run", World())
    finally:
        patched["batches"] = real
    first, second = orders
    assert len(first) == len(second) == 48
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 12


@pytest.fixture
def run(root: Path) -> Path:
    recipe = recipe_of(root)
    pretrain(recipe, open_set(root / "source"), root / "run", World())
    (root / "run" / "recipe.yaml").write_text(yaml.safe_dump(Recipe.model_validate(tree_of(root)).model_dump(mode="json")))
    return root / "run"


def translated(run: Path, images: Tensor, *, reverse: bool = False) -> Tensor:
    """The averaged translator by hand."""
    checkpoint = latest_valid(run / "pretrain")
    assert checkpoint
    network = Translators(SHAPE, 4, 1)
    network.load_state_dict(load_checkpoint(checkpoint, ("generator_ema",))[0]["generator_ema"])
    with torch.no_grad():
        return to_uint8((network.b_to_a if reverse else network.a_to_b)(images.float() / 127.5 - 1))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_set_is_translated_with_its_labels_and_says_by_what(run: Path, reverse: bool) -> None:
    checkpoint, source = latest_valid(run / "pretrain"), open_set(run.parent / "source")
    assert checkpoint
    made = translate_shards(checkpoint, source, str(run.parent / "made"), 40, reverse=reverse)
    images, labels = load_images(source, source.indices("train")[:40])
    found, told = load_images(made, np.arange(40))
    assert torch.equal(found, translated(run, images, reverse=reverse))
    assert torch.equal(told, labels) and made.manifest.classes == source.manifest.classes
    assert made.manifest.provenance["from_sha256"] == source.manifest.sha256
    assert made.manifest.provenance["direction"] == ("b to a" if reverse else "a to b")
    with pytest.raises(UserError, match="has 96 training images; lower --count"):
        translate_grid(checkpoint, source, run / "grid.png", 97)


def test_grids_show_images_above_their_translations(run: Path) -> None:
    def cells(path: Path, columns: int) -> list[list[Tensor]]:
        sheet = torch.from_numpy(np.array(Image.open(io.BytesIO(path.read_bytes()))))
        return [[sheet[top:top + 16, left:left + 16] for left in range(0, columns * 17, 17)]
                for top in range(0, len(sheet), 17)]

    source = open_set(run.parent / "source")
    assert main(["sample", str(run), "--from", "source", "--count", "11", "--out", str(run / "grid.png")]) == 0
    rows = cells(run / "grid.png", 5)
    images, _ = load_images(source, source.indices("train")[:11])
    expected = translated(run, images)
    assert len(rows) == 6
    for i in range(11):
        assert torch.equal(rows[i // 5 * 2][i % 5], images[i, 0])
        assert torch.equal(rows[i // 5 * 2 + 1][i % 5], expected[i, 0])
    above, below = (torch.stack(row)[:, None] for row in cells(run / "pretrain" / "samples.png", 8)[:2])
    assert torch.equal(below, translated(run, above))


def test_a_checkpoint_by_its_path_translates_the_whole_training_split(run: Path) -> None:
    out = str(run.parent / "all")
    assert main(["sample", str(latest_valid(run / "pretrain")), "--from", "other", "--reverse", "--shards", out]) == 0
    assert len(open_set(out)) == 96


def test_what_needs_images_from_noise_refuses_in_one_sentence(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, recipe = latest_valid(run / "pretrain"), recipe_of(run.parent)
    assert checkpoint
    for call in (lambda: averaged_generator(checkpoint), lambda: of_checkpoint(checkpoint, 8, 0),
                 lambda: metatrain(recipe, open_set(run.parent / "source"), run, checkpoint, "0")):
        with pytest.raises(UserError, match="of the family cyclegan, which translates images and makes none from noise"):
            call()
    assert main(["sample", str(run)]) == 2
    assert "graft sample RUN --from SET" in capsys.readouterr().err
    assert main(["sample", str(run), "--from", "source", "--truncation", "1"]) == 2
    assert main(["sample", str(run), "--reverse"]) == 2


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"data": {"translate_to": None}}, "data.translate_to, which is missing"),
    ({"training": {"family": "gan"}}, "is for families that translate, and training.family = gan"),
    ({"training": {"objective": {"loss": "least_squares"}}}, "no gradient penalties; set objective"),
    ({"training": {"objective": {**PLAIN, "pack": 2}}}, "no use for objective.pack"),
    ({"training": {"generator": {"classes": 2}}}, "no use for generator.classes"),
    ({"training": {"augmentation": {"kind": "diffaugment"}}}, "no use for an augmentation"),
    ({"meta": {"steps": 1}}, "meta.steps needs a generator that makes images from noise"),
    ({"evaluation": {"during_pretraining": 64}}, "evaluation.during_pretraining needs a generator"),
    ({"fanout": {"targets": [{"set": "source"}]}}, "leave fanout.targets out")])
def test_recipes_that_cannot_be_are_refused(tmp_path: Path, changes: dict[str, dict[str, Any]], sentence: str) -> None:
    tree = tree_of(tmp_path) | {"cluster": {"workers": 1}}
    for section, values in changes.items():
        tree[section] = {**tree.get(section, {}), **values}
    with pytest.raises(ValueError, match=sentence):
        Recipe.model_validate(tree)


def test_sets_of_unlike_shape_are_refused(root: Path) -> None:
    from data_shards import Sample, pack_images

    pack_images([Sample(f"{i}", np.full((3, 16, 16), i, np.uint8), 0, "train") for i in range(24)], root / "colour",
                name="colour", shape=(3, 16, 16), classes=["any"])
    recipe = recipe_of(root)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"translate_to": "colour"})})
    with pytest.raises(UserError, match=r"colour \(data.translate_to\) has images of shape \(3, 16, 16\)"):
        pretrain(recipe, open_set(root / "source"), root / "run", World())


def test_the_family_says_that_it_translates() -> None:
    assert FAMILIES["cyclegan"].translates and not FAMILIES["gan"].translates


def test_activation_checkpointing_changes_nothing(root: Path) -> None:
    plain = trained(World(), str(root), "plain", {"images": 24})
    again = trained(World(), str(root), "again", {"images": 24, "engine": {"kind": "torch", "checkpoint_activations": True}})
    for stem, named in plain.items():
        for name, value in named.items():
            torch.testing.assert_close(again[stem][name], value)
