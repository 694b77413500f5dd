"""The converter: which places of a batch are translated and by what, its own stage, and trials as exact as any other's."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_shards import Batch as Images
from data_shards import UserError, batches, open_set
from tests.toy import toy_set
from tests.training.methods.start import adaptation_of, recipe_of, start_of, trial_of, weights_of
from training import trial as trials
from training.draws import generator as draw
from training.loop import train
from training.methods import METHODS, Adaptation, converter
from training.methods.converter import translated_places
from training.methods.method import Method
from training.models.translation import Translator
from training.networks import make_networks
from training.pictures import translate
from training.recipe import TrainingRecipe
from training.source import rooted, source_parts
from training.target import support_indices
from training.trial import run_trial, trial_id

SECTION = "adaptation.converter"


def converted(root: Path, settings: Mapping[str, Any] | None = None, **section: Any) -> TrainingRecipe:
    return recipe_of(root, {**(settings or {}), **{f"{SECTION}.{key}": value for key, value in section.items()}})


def feed_of(run: Path, recipe: TrainingRecipe, images: int) -> Iterator[Images]:
    """The support set's batches, read by hand."""
    target, config = open_set(run.parent / "target"), recipe.adaptation
    return batches(target, batch=config.batch, seed=1, images_seen=images, streams=1,
                   subset=np.asarray(support_indices(target, config.shots, 1)))


def sources_of(run: Path, recipe: TrainingRecipe, images: int) -> Iterator[Images]:
    """The source's, likewise."""
    source = open_set(run.parent / "source")
    return batches(source_parts(recipe.data, source), batch=recipe.adaptation.batch, images_seen=images,
                   seed=draw(1, "converter source", 0).initial_seed())


def reading(run: Path, recipe: TrainingRecipe) -> Adaptation:
    return dataclasses.replace(adaptation_of(recipe, start_of(recipe)), feed=lambda images: feed_of(run, recipe, images))


def same(ours: Mapping[str, Mapping[str, Tensor]], theirs: Mapping[str, Mapping[str, Tensor]]) -> bool:
    return all(torch.equal(value, ours[stem][name]) for stem, named in theirs.items() for name, value in named.items())


def test_as_many_places_are_translated_as_the_ratio_says() -> None:
    for ratio, batch, allowed in ((0.0, 8, {0}), (0.3, 10, {3}), (0.37, 10, {3, 4}), (0.02, 10, {0, 1}), (1.0, 16, {16})):
        places = [translated_places(ratio, 1, at, batch) for at in range(0, 2000 * batch, batch)]
        assert {len(each) for each in places} == allowed
        assert sum(map(len, places)) / len(places) == pytest.approx(ratio * batch, abs=0.03)
        assert all(len(each) == len(set(each.tolist())) for each in places)
        share = torch.bincount(torch.cat(places), minlength=batch) / len(places)  # each place as often
        torch.testing.assert_close(share, torch.full((batch,), ratio), rtol=0, atol=0.04)


def test_the_places_follow_the_schedule_the_seed_and_the_images_seen() -> None:
    schedule = [(100.0, 0.0), (200.0, 1.0)]
    assert [len(translated_places(schedule, 1, at, 4)) for at in (0, 100, 125, 150, 200, 800)] == [0, 0, 1, 2, 4, 4]
    assert torch.equal(translated_places(0.5, 1, 48, 16), translated_places(0.5, 1, 48, 16))
    assert not torch.equal(translated_places(0.5, 1, 48, 16), translated_places(0.5, 2, 48, 16))
    assert not torch.equal(translated_places(0.5, 1, 48, 16), translated_places(0.5, 1, 64, 16))


def test_a_batch_has_source_images_in_those_places_and_support_images_in_the_others(run: Path) -> None:
    """By a translator that changes nothing; and from any position on the same batches come."""
    recipe = converted(run.parent, ratio=[[8, 0.0], [24, 1.0]])
    adaptation, networks = reading(run, recipe), {"translator": nn.Identity()}
    mixed = list(itertools.islice(METHODS["converter"].batches(adaptation, networks, feed_of(run, recipe, 0)), 9))
    counts = []
    for given, support, source in zip(mixed, feed_of(run, recipe, 0), sources_of(run, recipe, 0), strict=False):
        assert given.images_seen == support.images_seen
        places = translated_places(recipe.adaptation.converter.ratio, 1, given.images_seen - 4, 4).tolist()
        counts.append(len(places))
        for place in range(4):
            theirs = source if place in places else support
            assert torch.equal(given.images[place], theirs.images[place])
            assert given.keys[place] == theirs.keys[place]
            assert given.labels[place] == (-1 if place in places else support.labels[place])
            assert given.parts[place] == (place in places)
    assert counts == [0, 0, 0, 1, 2, 3, 4, 4, 4]
    later = METHODS["converter"].batches(adaptation, networks, feed_of(run, recipe, 16))
    for expected, given in zip(mixed[4:], later, strict=False):
        assert torch.equal(given.images, expected.images) and given.keys == expected.keys


def test_without_translated_images_it_is_finetune_after_the_translators_share(run: Path,
                                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: a method that only lets the first images pass is the reference."""
    recipe = converted(run.parent, share=0.25, ratio=0.0)
    monkeypatch.setitem(METHODS, "passing", Method(start="pretrain", prepare=lambda networks, adaptation: 8))
    monkeypatch.setitem(METHODS, "same", Method(start="pretrain"))
    ours, theirs, whole = (trial_of(run, recipe, method, domain="nothing") for method in ("converter", "passing", "finetune"))
    for trial in (ours, theirs, whole):
        assert run_trial(trial, recipe, run, until=32)["images_seen"] == 32
    expected = weights_of(run, theirs, recipe)
    assert same(weights_of(run, ours, recipe), expected)
    assert not same(weights_of(run, whole, recipe), expected)


def test_g_and_d_are_adapted_on_what_the_trained_translator_makes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches of a trial, from the translator in its checkpoint and images read by hand."""
    recipe, seen = converted(run.parent, share=0.5, ratio=0.75), []
    def noting(state: Any, phases: Any, feed: Iterator[Images], *arguments: Any, **named: Any) -> Any:
        def noted() -> Iterator[Images]:
            for given in feed:
                seen.append(given)
                yield given

        return train(state, phases, noted(), *arguments, **named)

    monkeypatch.setattr(trials, "train", noting)
    trial = trial_of(run, recipe, "converter", domain="translated")
    run_trial(trial, recipe, run, until=32)
    config, weights = recipe.adaptation.converter, weights_of(run, trial, recipe)
    translator = Translator(1, 1, config.channels, config.blocks)
    translator.load_state_dict(weights["translator"])
    assert [given.images_seen for given in seen] == [20, 24, 28, 32]
    for given, support, source in zip(seen, feed_of(run, recipe, 16), sources_of(run, recipe, 16), strict=False):
        places = translated_places(0.75, 1, given.images_seen - 4, 4)
        assert len(places) == 3
        expected = support.images.clone()
        expected[places] = translate(translator, source.images[places])
        assert torch.equal(given.images, expected)


def test_the_translator_is_trained_towards_the_support_set(run: Path) -> None:
    """Twenty bright images of one place: what it makes of any source image is near them, and nearer than at the start."""
    recipe = converted(run.parent, {"adaptation.images": 640, "adaptation.batch": 8}, share=0.75, channels=8, identity=0.0,
                       halvings=2)
    support = torch.full((20, 1, 16, 16), 200, dtype=torch.uint8)
    support[:, :, 4:12, 4:12] = 40
    plain = next(feed_of(run, recipe, 0))

    def feed(images: int) -> Iterator[Images]:
        for seen in itertools.count(images + 8, 8):
            yield dataclasses.replace(plain, images=support[:8], images_seen=seen)

    adaptation = dataclasses.replace(adaptation_of(recipe, start_of(recipe)), support=support, feed=feed)
    fresh: dict[str, nn.Module] = {}
    networks: dict[str, nn.Module] = {}
    assert METHODS["converter"].prepare(fresh, dataclasses.replace(adaptation, resumed=True)) == 0
    assert METHODS["converter"].prepare(networks, adaptation) == 480
    source = next(sources_of(run, recipe, 1600)).images
    far, near = ((translate(each["translator"], source).float() - support[0]).abs().mean() for each in (fresh, networks))
    assert near < 40 < 80 < far
    assert not any(parameter.requires_grad for parameter in networks["translator"].parameters())


def test_a_rung_reads_the_translator_and_the_stage_counts_in_the_budget(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, given = converted(run.parent, share=0.5), []
    plain = trials._support

    def counted(*arguments: Any) -> Iterator[Images]:
        for each in plain(*arguments):
            given.append(len(each.images))
            yield each

    monkeypatch.setattr(trials, "_support", counted)
    whole, stepwise = (trial_of(run, recipe, "converter", domain=domain) for domain in ("whole", "stepwise"))
    assert run_trial(whole, recipe, run, until=32)["images_seen"] == sum(given) == 32  # support images or their places
    first = run_trial(stepwise, recipe, run, until=8)
    assert (first["images_seen"], set(first["rungs"])) == (16, {"8"})  # a rung within the stage is reported after it
    monkeypatch.setattr(converter, "_train", lambda *_: pytest.fail("trained again"))
    for until in (20, 32):
        assert run_trial(stepwise, recipe, run, until=until)["images_seen"] == until
    expected = weights_of(run, whole, recipe)
    assert same(weights_of(run, stepwise, recipe), expected)
    assert "translator" in expected and "generator_average" in expected


def test_its_id_follows_its_settings_and_the_sources_content(run: Path, tmp_path: Path) -> None:
    recipe = converted(run.parent)
    identity = trial_id(trial_of(run, recipe, "converter"), recipe)
    others = {method: trial_id(trial_of(run, recipe, method), recipe) for method in ("finetune", "minegan", "scratch")}
    toy_set(tmp_path / "source", seed=9)
    section: dict[str, Any] = {"share": 0.3, "ratio": [[0, 0.5], [32, 0.0]], "channels": 5, "blocks": 3, "halvings": 2,
                               "cycle": 5.0, "identity": 0.0, "history": 9, "lr": 2e-4}
    assert {f"converter.{key}" for key in section} < set(METHODS["converter"].hyperparameters)
    unlike = [*(converted(run.parent, **{key: value}) for key, value in section.items()),
              *(converted(run.parent, settings) for settings in (
                  {"data.root": str(tmp_path)}, {"data.class_weights": {"bar": 1.0}}, {"data.window": 64}))]
    for other in unlike:
        assert trial_id(trial_of(run, recipe, "converter"), other) != identity
        assert {method: trial_id(trial_of(run, recipe, method), other) for method in others} == others
    shutil.copytree(run.parent / "source", tmp_path / "moved" / "source")
    moved = converted(run.parent, {"data.root": str(tmp_path / "moved"), "adaptation.minegan.share": 0.5})
    assert trial_id(trial_of(run, recipe, "converter"), moved) == identity


def test_a_worker_with_another_working_directory_finds_the_source(run: Path, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent.parent)
    here = converted(Path(run.parent.name))
    trial, sent = trial_of(run, here, "converter"), rooted(here)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no folder of shards at"):
        trial_id(trial, here)
    assert trial_id(trial, sent) == trial_id(trial, converted(run.parent))
    far = converted(run.parent, {"data.root": "s3://bucket/sets"})
    assert rooted(far) == far


@pytest.mark.parametrize("family", ["vae", "vaegan"])
def test_variational_families_are_adapted_on_translations_too(run: Path, family: str) -> None:
    rows = []
    for ratio in (0.0, 1.0):
        recipe = converted(run.parent, {"training.family": family}, ratio=ratio)
        trial = trial_of(run, recipe, "converter", domain=family)
        rows.append((run_trial(trial, recipe, run, until=32)["status"], weights_of(run, trial, recipe)))
    assert [status for status, _ in rows] == ["finished", "finished"]
    assert not same(rows[0][1], rows[1][1])


@pytest.mark.parametrize(("settings", "refused"), [
    ({"data.root": "/nowhere"}, r"there is no folder of shards at /nowhere/source; run `graft shards fetch"),
    ({f"{SECTION}.halvings": 3}, r"a patch of this discriminator does not fit 16 x 16 pixels; .* or fewer halvings"),
    ({"adaptation.conditional": True}, "translated images of the method converter have none"),
])
def test_what_cannot_be_translated_is_refused(run: Path, settings: dict[str, Any], refused: str) -> None:
    recipe = converted(run.parent, settings)
    with pytest.raises(UserError, match=refused):
        run_trial(trial_of(run, recipe, "converter"), recipe, run, until=32)


def test_a_source_of_another_shape_is_refused(run: Path) -> None:
    recipe = converted(run.parent)
    adaptation = dataclasses.replace(reading(run, recipe), support=torch.zeros(5, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"source .*/source, of shape \(1, 16, 16\), into images of .* \(3, 16, 16\); pack"):
        METHODS["converter"].prepare({}, adaptation)


@pytest.mark.parametrize(("family", "why"), [("sequence", "makes no pictures"), ("density", "is fitted at once")])
def test_a_family_that_does_not_learn_from_batches_of_images_is_refused(tmp_path: Path, family: str, why: str) -> None:
    recipe = converted(tmp_path, {"training.family": family})
    networks = make_networks(recipe.training, (3, 1, 16), 0)
    adaptation = Adaptation(recipe, networks, torch.zeros(4, 3, 1, 16, dtype=torch.uint8), 1, [])
    with pytest.raises(UserError, match=rf"the family {family} {why}; leave it out of fanout\.methods\."):
        METHODS["converter"].prepare(networks, adaptation)


@pytest.mark.parametrize(("key", "value"), [("ratio", 1.5), ("ratio", [[0, 0.5], [9, 2.0]]), ("share", 0.0), ("share", 0.95)])
def test_shares_beyond_the_whole_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"converter.{key}"):
        converted(tmp_path, **{key: value})
