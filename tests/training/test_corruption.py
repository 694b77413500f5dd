"""Corrupted data: what is spoilt, how much of it, and that nothing else is."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from cluster.recipe import Recipe
from data_shards import batches, load_images, open_set
from tests.toy import toy_recipe, toy_set, toy_tree
from tests.training.methods.start import trial_of
from training import loop
from training import trial as trials
from training.config import apply_overrides
from training.corruption import Corruption, corrupt_pool, corrupt_source, corrupted_rows, spoil
from training.metrics.encoder import save_encoder, train_encoder
from training.pretrain import pretrain, pretrain_id
from training.recipe import TrainingRecipe
from training.target import load_target
from training.trial import run_trial, trial_id
from training.world import World
from tune_spaces.config import FanoutConfig
from tune_spaces.plan import races

KINDS = ("noise", "occlusion", "mislabelled")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    source = toy_set(root / "source")
    toy_set(root / "target", train=30, reference=24, seed=5)
    images, labels = load_images(source, source.indices())
    save_encoder(train_encoder(images, labels, classes=2, seed=0, images_budget=256, threads=1),
                 root / "run" / "encoder.safetensors")
    return root


def test_noise_has_its_deviation_and_a_blot_is_a_quarter_of_the_image() -> None:
    draw = torch.Generator().manual_seed(0)
    grey = torch.full((1, 64, 64), 128, dtype=torch.uint8)
    noisy = spoil(grey, "noise", draw).float()
    assert noisy.mean() == pytest.approx(128, abs=3) and noisy.std() == pytest.approx(62, abs=3)  # clipped at 2 sd
    black = torch.zeros(3, 32, 32, dtype=torch.uint8)
    places = set()
    for _ in range(20):
        blot = (spoil(black + 1, "occlusion", draw) != 1).any(0)
        rows, columns = blot.any(1).nonzero().flatten(), blot.any(0).nonzero().flatten()
        assert blot.sum() in (0, 256), "16 by 16 of one grey, which may be that of the image"
        places.add((rows[0].item(), columns[0].item()) if len(rows) else None)
    assert len(places) > 10


@pytest.mark.parametrize("kind", KINDS)
def test_shares_are_exact_and_nested(kind: str) -> None:
    images = torch.randint(0, 256, (10, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    strangers = torch.full((3, 1, 8, 8), 9, dtype=torch.uint8)
    before: set[int] = set()
    for share in (0.0, 0.1, 0.2, 0.4):
        spoilt = corrupt_pool(images, Corruption(kind=kind, share=share), 3, "support", strangers)
        rows = {row for row in range(10) if not torch.equal(spoilt[row], images[row])}
        assert len(rows) == round(10 * share) and before <= rows
        assert torch.equal(spoilt, corrupt_pool(images, Corruption(kind=kind, share=share), 3, "support", strangers))
        if kind == "mislabelled":
            assert all((spoilt[row] == 9).all() for row in rows)
        before = rows
    four = Corruption(kind=kind, share=0.4)
    assert len({tuple(corrupted_rows(10, four, seed, "support").tolist()) for seed in range(9)}) > 4


@pytest.mark.parametrize("kind", ["noise", "occlusion"])
def test_a_source_image_is_spoilt_the_same_way_at_every_visit_and_on_every_rank(root: Path, kind: str) -> None:
    source, corruption = open_set(root / "source"), Corruption(kind=kind, share=0.4)
    clean = {name: images for name, images, _ in visits(source, None, 0)}
    seen = defaultdict(list)
    for name, image, _ in visits(source, corruption, 0):
        seen[name].append(image)
    assert all(torch.equal(images[0], image) for images in seen.values() for image in images)
    spoilt = {name for name, images in seen.items() if not torch.equal(images[0], clean[name])}
    assert 0.25 * 96 < len(spoilt) < 0.55 * 96
    less = {name for name, image, _ in visits(source, Corruption(kind=kind, share=0.2), 0)
            if not torch.equal(image, clean[name])}
    assert less < spoilt
    halves = [next(spoilt_feed(source, corruption, rank=rank, world=2)) for rank in (0, 1)]
    whole = next(spoilt_feed(source, corruption))
    ours = {name: image for half in halves for name, image in zip(half.keys, half.images, strict=True)}
    assert all(torch.equal(ours[name], image) for name, image in zip(whole.keys, whole.images, strict=True))


def spoilt_feed(source, corruption, rank=0, world=1, seed=0, classes=2):  # type: ignore[no-untyped-def]
    return corrupt_source(batches(source, batch=24, seed=1, rank=rank, world=world), corruption, seed, classes)


def visits(source, corruption, seed):  # type: ignore[no-untyped-def]
    feed = spoilt_feed(source, corruption, seed=seed)
    for _ in range(8):  # two passes
        batch = next(feed)
        yield from zip(batch.keys, batch.images, batch.labels, strict=True)


def test_a_wrong_class_is_another_one(root: Path) -> None:
    source = open_set(root / "source")
    right = {name: int(label) for name, _, label in visits(source, None, 0)}
    clean = {name: image for name, image, _ in visits(source, None, 0)}
    wrong = 0
    for name, image, label in visits(source, Corruption(kind="mislabelled", share=0.4), 0):
        assert torch.equal(image, clean[name]) and 0 <= label < 2
        wrong += int(label) != right[name]
    assert 0.25 < wrong / 192 < 0.55


def test_the_pool_is_spoilt_and_the_reference_is_not(root: Path) -> None:
    place, source = str(root / "target"), str(root / "source")
    clean = load_target(place, 10, 1)
    for kind in KINDS:
        found = load_target(place, 10, 1, Corruption(kind=kind, share=0.4), source)
        assert torch.equal(found.reference, clean.reference) and found.support_indices == clean.support_indices
        changed = [(found_part != clean_part).flatten(1).any(1).sum().item() for found_part, clean_part in (
            (found.support, clean.support), (found.held_back, clean.held_back))]
        assert changed == [4, 8] or (kind == "occlusion" and changed[0] in (3, 4) and changed[1] in (6, 7, 8))
    images = load_images(open_set(source), open_set(source).indices())[0]
    stranger = load_target(place, 10, 1, Corruption(kind="mislabelled", share=1.0), source).support
    assert all((images == one).flatten(1).all(1).any() for one in stranger)


def test_a_trial_trains_on_what_was_spoilt_and_says_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = toy_recipe(root)
    corruption = Corruption(kind="noise", share=0.4)
    trial = dataclasses.replace(trial_of(root / "run", recipe, "scratch"), domain="bars-noise-40", target="bars", phase="final",
                                corruption=corruption)
    fed: list[torch.Tensor] = []
    real = loop.train

    def spy(state, phases, feed, plan, **arguments):  # type: ignore[no-untyped-def]
        def noted():  # type: ignore[no-untyped-def]
            for batch in feed:
                fed.append(batch.images)
                yield batch

        return real(state, phases, noted(), plan, **arguments)

    monkeypatch.setattr(trials, "train", spy)
    row = run_trial(trial, recipe, root / "run", until=32)
    spoilt = load_target(trial.set_path, 5, 1, corruption, str(root / "source")).support
    assert all((spoilt == image).flatten(1).all(1).any() for image in torch.cat(fed))
    assert {tuple(image.flatten().tolist()) for image in torch.cat(fed)} == {tuple(i.flatten().tolist()) for i in spoilt}
    assert (row["domain"], row["target"], row["corruption"]) == ("bars-noise-40", "bars", {"kind": "noise", "share": 0.4})
    assert trials.rescore(row, recipe, root / "run", set_path=trial.set_path, net="encoder")["kid"] == row["kid"]
    identity = trial_id(trial, recipe)
    for other in (None, Corruption(kind="noise", share=0.2), Corruption(kind="occlusion", share=0.4)):
        assert trial_id(dataclasses.replace(trial, corruption=other), recipe) != identity


def test_every_share_is_a_domain_with_a_control_of_its_own(root: Path) -> None:
    fanout = FanoutConfig.model_validate({
        "targets": [{"set": "target"}], "methods": ["scratch"], "corruption": {"kind": "occlusion", "shares": [0, 0.1, 0.4]}})
    assert [domain.name for domain in fanout.domains()] == ["target", "target-occlusion-10", "target-occlusion-40"]
    found = races(toy_recipe(root), fanout, {})
    assert [race.domain for race in found] == ["target", "target-occlusion-10", "target-occlusion-40"]
    plain = races(toy_recipe(root), fanout.model_copy(update={"corruption": None}), {})
    assert found[0].search[0].identity == plain[0].search[0].identity, "a clean share is the domain as it always was"
    with pytest.raises(ValueError, match="shares must lie between 0 and 1 and differ"):
        FanoutConfig.model_validate({"corruption": {"kind": "noise", "shares": [0.1, 0.1]}})


def test_a_corrupted_source_is_another_pretraining(root: Path, tmp_path: Path) -> None:
    source = open_set(root / "source")
    spoilt = TrainingRecipe.model_validate(apply_overrides(
        toy_tree(root), {"data.corruption": {"kind": "noise", "share": 0.4}}))
    assert pretrain_id(spoilt, source) != pretrain_id(toy_recipe(root), source)
    last = [pretrain(recipe, source, tmp_path / name, World()) for name, recipe in
            (("spoilt", spoilt), ("clean", toy_recipe(root)))]
    from training.checkpoint import load_checkpoint

    one, two = (load_checkpoint(folder)[0]["discriminator"] for folder in last)
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_wrong_classes_that_nobody_is_told_are_refused(root: Path) -> None:
    tree = apply_overrides(toy_tree(root), {"data.corruption": {"kind": "mislabelled", "share": 0.4}})
    with pytest.raises(ValueError, match=r"do not see; tell them, or choose another kind"):
        Recipe.model_validate(tree | {"cluster": {"workers": 1}})
