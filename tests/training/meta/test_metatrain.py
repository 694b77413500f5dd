"""Meta-training: tasks in any process and an interrupted run end with the same bits, for every rule and family."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_shards import ShardSet, UserError
from tests.toy import toy_recipe, toy_set, toy_tree
from tests.training.meta.points import ONE_NETWORK, Point
from training.checkpoint import checkpoint_hash, latest_valid, load_checkpoint, save_checkpoint
from training.config import apply_overrides
from training.events import read_events
from training.families import FAMILIES
from training.loop import NonFinite
from training.meta import RULES
from training.meta.config import MetaConfig
from training.meta.metatrain import Shared, Task, draw_tasks, meta_id, metatrain, run_task, run_tasks_here
from training.pretrain import pretrain
from training.recipe import TrainingRecipe, resolve
from training.world import World

SETTINGS: dict[str, dict[str, Any]] = {
    "reptile": {},
    "figr": {"inner_optimizer": "sgd", "outer_optimizer": "adam", "outer_lr": 1e-3},
    "fomaml": {"rule": "fomaml", "queries": 4, "outer_optimizer": "adam", "outer_lr": 1e-3},
    "maml": {"rule": "maml", "queries": 4, "inner_optimizer": "sgd", "inner_lr": 1e-2, "outer_optimizer": "adam",
             "outer_lr": 1e-3},
    "anil": {"rule": "maml", "queries": 4, "inner_optimizer": "sgd", "outer_lr": 1e-2,
             "inner_parts": ["generator.project.*", "discriminator.head.*"]},
}


class Prepared:
    """A pretrained start over a set of two classes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.source: ShardSet = toy_set(root / "source")
        self.start = pretrain(toy_recipe(root, images=16), self.source, root / "run", World())

    def recipe(self, **meta: Any) -> TrainingRecipe:
        tree = toy_tree(self.root, images=16)
        return TrainingRecipe.model_validate(apply_overrides(tree, {f"meta.{key}": value for key, value in meta.items()}))

    def run(self, name: str, recipe: TrainingRecipe, **how: Any) -> Path:
        return metatrain(recipe, self.source, self.root / name, self.start, checkpoint_hash(self.start), **how)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as workers:
        yield workers


def same(first: Path, second: Path) -> None:
    """The checkpoints hold the same bits, the optimizers' state among them."""
    ours, theirs = load_checkpoint(first)[0], load_checkpoint(second)[0]
    assert ours.keys() == theirs.keys()
    for stem, named in ours.items():
        assert named.keys() == theirs[stem].keys()
        assert all(torch.equal(value, theirs[stem][key]) for key, value in named.items()), stem


@pytest.mark.parametrize("name", SETTINGS)
def test_tasks_spread_over_processes_give_the_bits_of_one_process(prepared: Prepared, pool: ProcessPoolExecutor,
                                                                 name: str) -> None:
    recipe = prepared.recipe(tasks=3, **SETTINGS[name])

    def spread(run: Any, shared: Shared, tasks: list[Task]) -> list[Any]:
        futures = [pool.submit(run, shared, task) for task in reversed(tasks)]
        return [future.result() for future in reversed(futures)]

    one = prepared.run(f"{name}-one", recipe)
    same(one, prepared.run(f"{name}-spread", recipe, map_tasks=spread))
    after, before = load_checkpoint(one)[0], load_checkpoint(prepared.start)[0]
    assert ("generator_optimizer" in after) is (recipe.meta.outer_optimizer == "adam")
    for stem, origin in (("generator", "generator_ema"), ("discriminator", "discriminator")):
        assert all(not torch.equal(value, before[origin][key]) for key, value in after[stem].items()), "all weights learn"


@pytest.mark.parametrize("name", SETTINGS)
def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(prepared: Prepared, name: str) -> None:
    recipe = prepared.recipe(steps=5, snapshot_every_steps=2, **SETTINGS[name])
    whole = prepared.run(f"{name}-whole", recipe)
    calls = iter(range(99))

    def dies(run: Any, shared: Shared, tasks: list[Task]) -> list[Any]:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return run_tasks_here(run, shared, tasks)

    with pytest.raises(KeyboardInterrupt):
        prepared.run(f"{name}-killed", recipe, map_tasks=dies)
    folder = prepared.root / f"{name}-killed" / "meta" / whole.parent.name
    newest = latest_valid(folder)
    assert newest is not None
    assert newest.name == f"step-{2 * recipe.meta.images_per_step:012d}"
    same(whole, prepared.run(f"{name}-killed", recipe))
    logged = [event["images"] for event in read_events(folder / "events.jsonl")]
    assert logged == [step * recipe.meta.images_per_step for step in range(1, 6)]
    same(whole, prepared.run(f"{name}-killed", recipe, map_tasks=lambda *_: pytest.fail("trained again")))


def test_more_steps_go_on_from_where_fewer_ended(prepared: Prepared) -> None:
    settings = SETTINGS["figr"]
    whole = prepared.run("more-whole", prepared.recipe(steps=3, **settings))
    prepared.run("more", prepared.recipe(steps=2, **settings))
    again = prepared.run("more", prepared.recipe(steps=3, **settings))
    assert again.parent.name == whole.parent.name
    same(whole, again)


def test_images_are_those_that_tasks_see(prepared: Prepared) -> None:
    assert prepared.run("seen", prepared.recipe()).name == f"step-{3 * 2 * 2 * 4:012d}"
    assert prepared.run("seen", prepared.recipe(rule="fomaml", queries=5)).name == f"step-{3 * 2 * (2 * 4 + 5):012d}"


def test_a_task_trains_on_its_own_class_only(prepared: Prepared) -> None:
    recipe = prepared.recipe()
    tasks = draw_tasks(recipe, prepared.source, 0)
    assert {task.label for task in tasks} == {0, 1}
    assert draw_tasks(recipe, prepared.source, 0) == tasks != draw_tasks(recipe, prepared.source, 1)
    tensors, _ = load_checkpoint(prepared.start, ("generator_ema", "discriminator"))
    shared = Shared(recipe, {"generator": tensors["generator_ema"], "discriminator": tensors["discriminator"]})
    first, second = (run_task(shared, task) for task in tasks)
    assert not torch.equal(first.gradients["discriminator"]["head.weight"], second.gradients["discriminator"]["head.weight"])
    assert "generator/adversarial" in first.metrics


@pytest.mark.parametrize("name", SETTINGS)
def test_a_family_of_one_network(prepared: Prepared, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Rules know networks by the family's names only."""
    monkeypatch.setitem(FAMILIES, "point", ONE_NETWORK)
    parts = {"inner_parts": ["*.head"]} if "inner_parts" in SETTINGS[name] else {}
    recipe = prepared.recipe(**SETTINGS[name] | parts)
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"family": "point"})})
    start = prepared.root / f"{name}-point" / "pretrain" / "step-000000000016"
    sha = save_checkpoint(start, {"generator_ema": Point(shape=(1, 16, 16)).state_dict()}, {"images": 16})
    after, _ = load_checkpoint(metatrain(recipe, prepared.source, prepared.root / f"{name}-point", start, sha))
    assert {stem for stem in after if not stem.endswith("_optimizer")} == {"generator", "generator_ema"}
    assert after["generator"]["body"].item() != 0.5
    assert after["generator"]["head"].item() != -1.0


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("family", ["vae", "vaegan"])
def test_autoencoders(tmp_path: Path, family: str, name: str) -> None:
    """Encoder and decoder, one network, are meta-learned together."""
    settings = SETTINGS[name] | {"inner_lr": 1e-6}  # losses are sums over pixels
    if name == "anil":
        settings |= {"outer_lr": 1e-6, "inner_parts": ["generator.*bias"]}
    tree = toy_tree(tmp_path, images=16, family=family)
    tree = apply_overrides(tree, {f"meta.{key}": value for key, value in settings.items()})
    recipe, source = TrainingRecipe.model_validate(tree), toy_set(tmp_path / "source")
    start = pretrain(recipe, source, tmp_path / "run", World())
    if family == "vaegan" and recipe.meta.rule == "maml":
        with pytest.raises(UserError, match="the family vaegan, whose losses stop gradients on their way; use fomaml"):
            metatrain(recipe, source, tmp_path / "run", start, checkpoint_hash(start))
        return
    after = load_checkpoint(metatrain(recipe, source, tmp_path / "run", start, checkpoint_hash(start)))[0]["generator"]
    before = load_checkpoint(start)[0]["generator_ema"]
    assert all(not torch.equal(value, before[key]) for key, value in after.items())


def test_the_id_follows_the_rule_and_its_settings(prepared: Prepared) -> None:
    sha = checkpoint_hash(prepared.start)
    recipes = [prepared.recipe(**settings) for settings in SETTINGS.values()]
    identities = [meta_id(recipe, sha, prepared.source) for recipe in recipes]
    assert len(set(identities)) == len(SETTINGS)
    assert [identity.partition("-")[0] for identity in identities] == [recipe.meta.rule for recipe in recipes]
    base = prepared.recipe()
    for same_run in (prepared.recipe(steps=9), prepared.recipe(report_every_steps=7), prepared.recipe(also={"fomaml": {}})):
        assert meta_id(same_run, sha, prepared.source) == meta_id(base, sha, prepared.source)


def test_further_meta_trainings_differ_by_what_also_says() -> None:
    config = MetaConfig(steps=7, tasks=3, also={"fomaml": {"outer_optimizer": "adam", "outer_lr": 1e-4},
                                                "maml": {"inner_optimizer": "sgd", "steps": 2}})
    found = config.each()
    assert list(found) == ["reptile", "fomaml", "maml"]
    assert [one.rule for one in found.values()] == list(found)
    assert [(one.steps, one.tasks, one.outer_optimizer, one.outer_lr) for one in found.values()] == [
        (7, 3, "sgd", 0.5), (7, 3, "adam", 1e-4), (2, 3, "sgd", 0.5)]
    assert all(not one.also for one in found.values())


@pytest.mark.parametrize(("meta", "sentence"), [
    ({"rule": "mamal"}, r"meta\.rule = 'mamal' is refused: there is no such rule; known: reptile, fomaml, maml\."),
    ({"rule": "maml"}, r"the rule maml differentiates .* inner_optimizer must be sgd; set that, or use fomaml"),
    ({"also": {"maml": {}}}, r"meta\.also\.maml.* inner_optimizer must be sgd"),
    ({"also": {"fomaml": {"outer_lrr": 1}}}, r"meta\.also\.fomaml: unknown key 'outer_lrr'; did you mean 'outer_lr'"),
    ({"also": {"maml2": {}}}, r"there is no such rule; known: reptile, fomaml, maml"),
    ({"also": {"reptile": {"steps": 3}}}, r"also\.reptile is to hold what differs for another rule than reptile"),
    ({"also": {"fomaml": {"rule": "maml"}}}, r"give neither rule nor also in it"),
    ({"inner_parts": []}, r"meta\.inner_parts"),
])
def test_settings_that_do_not_go_together_are_refused(tmp_path: Path, meta: dict[str, Any], sentence: str) -> None:
    tree: dict[str, Any] = toy_tree(tmp_path)
    tree["meta"] = {**tree["meta"], **meta}
    with pytest.raises(UserError, match=sentence) as caught:
        resolve(TrainingRecipe, tree, where="mine.yaml")
    assert "\n" not in str(caught.value)


def test_queries_fall_into_packs_too(tmp_path: Path) -> None:
    tree: dict[str, Any] = toy_tree(tmp_path, objective={"pack": 2})
    tree["meta"] = {**tree["meta"], "queries": 5}
    resolve(TrainingRecipe, tree, where="mine.yaml")  # reptile reads none
    tree["meta"] = {**tree["meta"], "rule": "fomaml"}
    with pytest.raises(UserError, match=r"meta\.queries = 5 does not fall into packs of 2"):
        resolve(TrainingRecipe, tree, where="mine.yaml")


def test_what_cannot_be_meta_trained_is_refused_before_it_begins(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    def untouched(*_: Any) -> list[Any]:
        pytest.fail("tasks were run")

    for meta, sentence in (({"inner_parts": ["nothing.*"]}, "which matches no weight"), ({"steps": 0}, r"meta\.steps is 0")):
        with pytest.raises(UserError, match=sentence):
            prepared.run("refused", prepared.recipe(**meta), map_tasks=untouched)
    recipe = prepared.recipe(**SETTINGS["maml"])
    discriminator = recipe.training.discriminator.model_copy(update={"spectral_norm": True})
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"discriminator": discriminator})})
    with pytest.raises(UserError, match="spectral norms"):
        prepared.run("refused", recipe, map_tasks=untouched)
    monkeypatch.setitem(FAMILIES, "still", replace(FAMILIES["gan"], phases=lambda config, augmentation: []))
    still = prepared.recipe()
    still = still.model_copy(update={"training": still.training.model_copy(update={"family": "still"})})
    with pytest.raises(UserError, match="the family still takes no steps"):
        prepared.run("refused", still, map_tasks=untouched)
    with pytest.raises(UserError, match=r"meta\.shots = 99 and 0 queries need 99 images of every class"):
        prepared.run("refused", prepared.recipe(shots=99), map_tasks=untouched)


def test_weights_that_are_not_finite_are_never_saved(prepared: Prepared) -> None:
    recipe = prepared.recipe(**SETTINGS["maml"] | {"outer_optimizer": "sgd", "inner_lr": 1e30})
    with pytest.raises(NonFinite, match=r"lower meta\.inner_lr or meta\.outer_lr"):
        prepared.run("broken", recipe)
    assert not list((prepared.root / "broken").rglob("state.json"))


def test_every_rule_is_tried_here() -> None:
    assert {settings.get("rule", "reptile") for settings in SETTINGS.values()} == set(RULES)
