"""Collapse, overfitting and explosion are seen within three looks, and a perfect sampler raises no alarm."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_shards import open_set
from tests.ranks import run_ranks
from tests.toy import stroke_set, toy_recipe, toy_set
from training.checkpoint import load_checkpoint, save_checkpoint, step_folder
from training.events import append_event, read_events
from training.health import (
    RULES,
    Alarm,
    HealthConfig,
    Unhealthy,
    act,
    alarms,
    make_watch,
    news,
    observe,
    safe_images,
    story,
)
from training.networks import make_networks
from training.pretrain import finished_pretraining, pretrain
from training.rollback import roll_back, scale_after
from training.source import held_back, source_parts, watched_ids
from training.vitals import Looked, distances, features, look, overfitting_readings, what_to_look_at
from training.vitals import Moments as M
from training.world import World

CONFIG = HealthConfig()
LOOK = 64  # images of each kind in these tests


def events(name: str, values: Sequence[float], every: int = 100) -> list[dict[str, Any]]:
    return [{"images": every * (i + 1), "metrics": {name: value}} for i, value in enumerate(values)]


def ratios(*values: float) -> list[dict[str, Any]]:
    log = events("health/distance_ratio", values)
    return [{**event, "metrics": event["metrics"] | {"health/nearest_ratio": 1.0}} for event in log]


class Player(nn.Module):
    """A "generator" that gives the rows of ``images`` in turn, whatever the latents."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images, self.at = images, 0

    def forward(self, z: Tensor) -> Tensor:
        index = torch.arange(self.at, self.at + len(z)) % len(self.images)
        self.at += len(z)
        return self.images[index]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """600 strokes of 16 px, no two alike, uint8."""
    from data_shards import load_images

    strokes = stroke_set(tmp_path_factory.mktemp("strokes") / "set", train=560, reference=40)
    return load_images(strokes, range(len(strokes)))[0]


def signed(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def looked_at(pool: Tensor, seed: int) -> tuple[Looked, Tensor]:
    """Training and held-out images drawn by ``seed``, and the rest of the pool."""
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    train, held, rest = order.split([LOOK, LOOK, len(pool) - 2 * LOOK])
    return Looked(pool[train], pool[held], seed, 4), signed(pool[rest])


def watched(looked: Looked, networks: dict[str, nn.Module], looks: int = 3) -> dict[str, Alarm]:
    watch = make_watch(CONFIG, [])
    for number in range(looks):
        observe(watch, 8192 * (number + 1), look(looked, networks, World(), batch=16))
    return watch.alarms


@pytest.mark.parametrize("kept", [1, 2, 8])
def test_a_generator_frozen_on_few_images_raises_the_alarm_at_the_third_look(pool: Tensor, kept: int) -> None:
    looked, rest = looked_at(pool, 0)
    for noise in (0.0, 0.1):
        shown = rest[:kept].repeat(LOOK // kept, 1, 1, 1)
        shown = shown + noise * torch.randn(shown.shape, generator=torch.Generator().manual_seed(1))
        assert watched(looked, {"generator": Player(shown)}, looks=2) == {}
        found = watched(looked, {"generator": Player(shown)})
        assert list(found) == ["collapse"] and found["collapse"].since == 8192


def test_a_perfect_sampler_raises_no_alarm_in_100_runs(pool: Tensor) -> None:
    torch.manual_seed(0)
    discriminator = nn.Sequential(nn.Flatten(), nn.Linear(256, 32), nn.LeakyReLU(), nn.Linear(32, 1), nn.Flatten(0))
    bad = 0
    for seed in range(100):
        looked, rest = looked_at(pool, seed)
        watch = make_watch(CONFIG, [])
        networks = {"generator": Player(rest), "discriminator": discriminator}
        for number in range(6):
            readings = look(looked, networks, World(), batch=16)
            bad += readings["health/distance_ratio"] < CONFIG.min_distance_ratio
            bad += readings["health/nearest_ratio"] < CONFIG.min_distance_ratio
            observe(watch, 8192 * (number + 1), readings)
            assert not watch.alarms
    assert bad == 0, "not even one reading of 1,200 was bad"


def test_distances_against_scipy() -> None:
    from scipy.spatial.distance import pdist, squareform

    rows = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    whole = squareform(pdist(rows.double().numpy()))
    np.fill_diagonal(whole, np.inf)
    expected = pdist(rows.double().numpy()).mean(), whole.min(1).mean()
    assert distances(rows) == pytest.approx(expected, rel=1e-12)
    assert features(torch.zeros(3, 2, 28, 28)).shape == (3, 128)


def test_r_v_by_hand_and_free_of_a_constant_in_the_logits() -> None:
    plain = overfitting_readings(M(3.0, 0.01), M(1.5, 0.03), M(1.0, 0.01))
    assert plain == {"health/r_v": pytest.approx(0.75), "health/r_v_z": pytest.approx(1.5 / 0.2)}
    moved = overfitting_readings(M(103.0, 0.01), M(101.5, 0.03), M(101.0, 0.01))
    assert moved == pytest.approx(plain)
    assert overfitting_readings(M(1.0, 0.1), M(0.0, 0.1), M(1.1, 0.1))["health/r_v"] == 0.0, "undefined"


def trained(network: nn.Module, real: Tensor, fake: Tensor, steps: int, weight_decay: float) -> nn.Module:
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=weight_decay)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.softplus(network(fake) - network(real)).mean().backward()  # relativistic: no zero of the logits
        optimizer.step()
    return network


def test_a_discriminator_that_memorised_its_training_set_is_seen_by_the_gap(pool: Tensor) -> None:
    looked, rest = looked_at(pool, 3)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 1), nn.Flatten(0))
    memorised = trained(network, signed(looked.training), rest[:LOOK], steps=150, weight_decay=0.0)
    found = watched(looked, {"generator": Player(rest[LOOK:]), "discriminator": memorised})
    assert list(found) == ["overfitting"] and "training images" in found["overfitting"].reading


def test_a_discriminator_that_tells_real_from_noise_without_memory_raises_no_alarm(pool: Tensor) -> None:
    for seed in range(20):
        looked, rest = looked_at(pool, seed)
        torch.manual_seed(seed)
        mean = rest.mean(0, keepdim=True)
        blurred = mean + 0.8 * (rest - mean).roll(3, 0)  # diverse, and not real
        network = nn.Sequential(nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 1), nn.Flatten(0))
        trained(network, rest[:300], blurred[:300], steps=60, weight_decay=0.1)
        networks = {"generator": Player(blurred), "discriminator": network}
        assert look(looked, networks, World(), 16)["health/r_v"] < CONFIG.max_overfitting
        assert watched(looked, networks) == {}


def test_chance_gaps_of_equal_logits_raise_no_alarm_in_1000_runs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(1000):
        log = []
        train, held = rng.normal(1, 1, 256), rng.normal(1, 1, 256)  # the same images at each look: the chance persists
        for number in range(6):
            fake = rng.normal(0.6, 1, 256)
            kinds = [M(x.mean(), x.var() / 256) for x in (train, held, fake)]
            log.append({"images": 100 * number, "metrics": overfitting_readings(*kinds)})
        assert alarms(log, CONFIG) == {}


def test_an_exploding_gradient_norm_is_seen_and_a_growing_one_is_not() -> None:
    for network in ("generator", "discriminator"):
        name = f"{network}/grad_norm"
        assert alarms(events(name, [1.0] * 5 + [50.0] * 2), CONFIG) == {}
        (alarm,) = alarms(events(name, [1.0, 1.2, 0.9, 1.1, 1.0, 50.0, 60.0, 70.0]), CONFIG).values()
        assert (alarm.rule, alarm.since, alarm.safe) == (f"{network}_explosion", 600, 500)
        assert alarms(events(name, [1.0] * 5 + [50.0] * 60), CONFIG), "the median is not dragged along"
        assert alarms(events(name, [1.05**k for k in range(200)]), CONFIG) == {}, "fourfold in 28 reports"
        assert alarms(events(name, [1.0] * 3 + [50.0] * 3), CONFIG) == {}, "too few to compare with"


def test_collapse_needs_three_in_a_row_and_learning_is_none() -> None:
    assert alarms(ratios(0.9, 0.3, 0.3, 0.8, 0.3, 0.3), CONFIG) == {}
    (alarm,) = alarms(ratios(0.9, 0.8, 0.4, 0.3, 0.35), CONFIG).values()
    assert (alarm.since, alarm.safe) == (300, 200) and "0.35 times as far apart" in str(alarm)
    assert alarms(ratios(0.1, 0.2, 0.3, 0.4), CONFIG) == {}, "never well yet, and rising"
    assert alarms(ratios(0.1, 0.1, 0.1), CONFIG) and alarms(ratios(0.9, 0.1, 0.2, 0.3), CONFIG)


def test_news_are_told_once_and_the_flags_tell_the_page_the_same_story() -> None:
    watch, told, log = make_watch(CONFIG, []), [], []
    for event in ratios(0.9, 0.1, 0.1, 0.1, 0.1, 0.9, 0.9):
        flags, sentences = observe(watch, event["images"], event["metrics"])
        told += [(event["images"], sentence) for sentence in sentences]
        log.append({"images": event["images"], "metrics": event["metrics"] | flags})
        assert set(flags) == {f"health/{name}" for name in RULES}
        assert not set(flags) & set(event["metrics"]), "a flag must not take a reading's name"
    assert [images for images, _ in told] == [400, 600]
    assert told[0][1].startswith("health: collapse since 200 images") and told[1][1] == "health: collapse is over"
    assert story(log, CONFIG) == told
    resumed = make_watch(CONFIG, log[:5])
    assert list(resumed.alarms) == ["collapse"] and news(resumed.alarms, resumed.alarms) == []


def test_safe_is_the_last_good_look_and_not_the_last_report() -> None:
    log = [*ratios(0.9, 0.9), *events("generator/grad_norm", [1.0] * 8, every=50)]
    assert safe_images(log, CONFIG) == 200
    assert safe_images([*ratios(0.9, 0.9, 0.1)], CONFIG) == 200 and safe_images([], CONFIG) == 0


def test_what_an_alarm_does() -> None:
    for action, error in (("stop", Unhealthy), ("rollback", Unhealthy)):
        watch = make_watch(HealthConfig(action=action), ratios(0.9, 0.1, 0.1, 0.1))
        with pytest.raises(error, match="collapse since 200 images"):
            act(watch)
    act(make_watch(CONFIG, ratios(0.9, 0.1, 0.1, 0.1)))
    spent = [*ratios(0.9, 0.1, 0.1, 0.1), {"images": 100, "metrics": {"health/rollbacks": 2.0, "lr_scale": 0.25}}]
    spent = [spent[0], spent[-1], *spent[1:-1]]
    with pytest.raises(Unhealthy, match="stopped after 2 rollbacks"):
        act(make_watch(HealthConfig(action="rollback"), spent))


# ---- in a pretraining


def stems(checkpoint: Path) -> dict[str, dict[str, Tensor]]:
    return load_checkpoint(checkpoint)[0]


def test_looking_changes_no_weight(tmp_path: Path) -> None:
    source = toy_set(tmp_path / "source")
    runs = {every: pretrain(toy_recipe(tmp_path, health={"every_images": every, "images": 16}), source,
                            tmp_path / str(every), World()) for every in (0, 16)}
    on, off = (stems(runs[every]) for every in (16, 0))
    assert all(torch.equal(on[stem][name], off[stem][name]) for stem in off for name in off[stem])
    logged = [event["metrics"] for event in read_events(tmp_path / "16" / "pretrain" / "events.jsonl")]
    readings = {"health/distance_ratio", "health/nearest_ratio", "health/r_v", "health/r_v_z"}
    assert all(readings | {f"health/{name}" for name in RULES} <= set(metrics) for metrics in logged)


class Noisy(nn.Module):
    """Everything that a look must not move: dropout's draws, spectral norm's vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.utils.parametrizations.spectral_norm(nn.Linear(256, 1))

    def forward(self, images: Tensor) -> Tensor:
        noise = torch.randn(len(images), 1)
        return (self.layer(nn.functional.dropout(images.flatten(1), training=self.training)) + noise).squeeze(1)


def test_a_look_leaves_buffers_modes_and_random_state_and_is_the_same_again(pool: Tensor) -> None:
    looked, rest = looked_at(pool, 0)
    network = Noisy().train()
    before, state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    readings = [look(looked, {"generator": Player(rest), "discriminator": network}, World(), 16) for _ in range(2)]
    assert readings[0] == readings[1]
    assert torch.equal(torch.get_rng_state(), state) and network.training and network.layer.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def looked_by_ranks(world: World, folder: str) -> dict[str, float]:
    recipe, source = toy_recipe(Path(folder)), open_set(Path(folder) / "source")
    networks = make_networks(recipe.training, source.manifest.image_shape, recipe.seed)
    looked = what_to_look_at(source, *watched_ids(recipe.data, source), images=25, seed=0, latent_dim=4)
    return look(looked, networks, world, batch=4)


def test_two_ranks_and_one_see_the_same(tmp_path: Path) -> None:
    toy_set(tmp_path / "source", reference=17)
    alone = looked_by_ranks(World(), str(tmp_path))
    for readings in run_ranks(looked_by_ranks, 2, str(tmp_path)):
        assert readings == pytest.approx(alone, rel=1e-5, abs=1e-6)


def scripted(script: Callable[[int], float]) -> Callable[..., dict[str, float]]:
    """In place of `look`: the distance ratio by how often it was asked."""
    asked = iter(range(10**6))
    return lambda *_arguments, **_named: {"health/distance_ratio": script(next(asked)), "health/nearest_ratio": 1.0}


def test_stop_ends_in_one_sentence_with_the_checkpoint_before_the_alarm_kept(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    source = toy_set(tmp_path / "source")
    monkeypatch.setattr("training.pretrain.look", scripted(lambda number: 0.9 if number < 2 else 0.1))
    recipe = toy_recipe(tmp_path, images=160, snapshot_every_images=8, report_every_images=8,
                        health={"every_images": 16, "images": 16, "action": "stop"})
    with caplog.at_level(logging.WARNING), pytest.raises(Unhealthy, match="collapse since 48 images"):
        pretrain(recipe, source, tmp_path / "run", World())
    assert [record.getMessage().count("collapse since 48") for record in caplog.records if record.name == "graft"] == [1]
    kept = sorted(int(path.name[5:]) for path in (tmp_path / "run" / "pretrain").glob("step-*"))
    assert kept == [32, 64, 72], "the two newest and the newest good one"
    assert read_events(tmp_path / "run" / "pretrain" / "events.jsonl")[-1]["metrics"]["health/collapse"] == 1.0


def test_rollback_goes_on_before_the_alarm_at_half_the_rate_a_bounded_number_of_times(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = toy_set(tmp_path / "source")
    settings = {"images": 160, "snapshot_every_images": 16, "report_every_images": 16}
    health = {"every_images": 16, "images": 16, "action": "rollback"}
    monkeypatch.setattr("training.pretrain.look", scripted(lambda number: 0.1 if 2 <= number < 5 else 0.9))
    recipe = toy_recipe(tmp_path, **settings, health=health)
    last = pretrain(recipe, source, tmp_path / "run", World())
    assert finished_pretraining(recipe, source, tmp_path / "run" / "pretrain") == last
    assert load_checkpoint(last, ("generator",))[1]["lr_scale"] == 0.5
    log = read_events(tmp_path / "run" / "pretrain" / "events.jsonl")
    assert [event["images"] for event in log] == [16, 32, 32, *range(48, 161, 16)]
    assert log[2]["metrics"] == {"health/rollbacks": 1.0, "lr_scale": 0.5}

    # The weights are those of a run at half the rates from 32 images on.
    rates = {name: {"channels": 4, "latent_dim": 4, "lr": [[0, 2e-4], [31, 2e-4], [32, 1e-4]]}
             for name in ("generator", "discriminator")}
    rates["discriminator"].pop("latent_dim")
    other = pretrain(toy_recipe(tmp_path, **settings, **rates, health={"every_images": 0}), source, tmp_path / "other", World())
    for name, weight in stems(other)["generator"].items():
        torch.testing.assert_close(stems(last)["generator"][name], weight, rtol=0, atol=1e-7)

    monkeypatch.setattr("training.pretrain.look", scripted(lambda number: 0.9 if number < 2 else 0.1))
    with pytest.raises(Unhealthy, match="stopped after 2 rollbacks: collapse"):
        pretrain(toy_recipe(tmp_path, **settings, health=health), source, tmp_path / "again", World())
    monkeypatch.setattr("training.pretrain.look", scripted(lambda number: 0.1))
    with pytest.raises(Unhealthy, match="No checkpoint is from before it"):
        pretrain(toy_recipe(tmp_path, **settings, health=health), source, tmp_path / "never", World())


def test_a_second_rollback_to_the_same_place_lowers_the_rate_again(tmp_path: Path) -> None:
    config, alarm = HealthConfig(action="rollback"), Alarm("collapse", 48, 40, "")
    for images in (32, 48):
        save_checkpoint(step_folder(tmp_path, images), {"generator": {"w": torch.zeros(1)}}, {"images": images})
        append_event(tmp_path / "events.jsonl", stage="pretrain", images=images, metrics={"images_per_second": 1.0})
    for count in (1, 2):
        roll_back(tmp_path, alarm, config, World())
        log = read_events(tmp_path / "events.jsonl")
        assert log[-1]["metrics"] == {"health/rollbacks": float(count), "lr_scale": 0.5**count}
        assert [path.name for path in tmp_path.glob("step-*")] == ["step-000000000032"]
    assert scale_after(log, 32, 1.0) == 0.25 and scale_after(log, 48, 0.25) == 0.25


# ---- which images


def test_a_source_without_a_reference_split_holds_some_images_back(tmp_path: Path) -> None:
    source, recipe = toy_set(tmp_path / "source", train=96, reference=0), toy_recipe(tmp_path)
    held = held_back(recipe.data, source)
    assert len(held) == 96 // 20
    trained_on, other = watched_ids(recipe.data, source)
    assert sorted([*trained_on, *held]) == list(range(96)) and list(other) == list(held)
    for weights in ("balanced", {"cross": 1.0}):
        parts = source_parts(recipe.data.model_copy(update={"class_weights": weights}), source)
        assert not any(set(part.subset) & set(held) for part in parts if part.subset is not None)
    only, other = watched_ids(recipe.data.model_copy(update={"class_weights": {"cross": 1.0}}), source)
    assert set(source.samples["label"][np.concatenate([only, other])]) == {1}
    assert len(held_back(recipe.data.model_copy(update={"held_back": 0}), source)) == 0
    assert len(held_back(recipe.data, toy_set(tmp_path / "with", train=96, reference=16))) == 0
