"""Reptile: the outer step's formula, tasks in parallel = one by one, resume, and that it does move."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tests.toy import toy_recipe, toy_set
from training.checkpoint import checkpoint_hash, load_checkpoint
from training.meta.reptile import InnerLoop, adapt_to_task, draw_tasks, metatrain, outer_step
from training.pretrain import pretrain
from training.recipe import TrainingRecipe
from training.world import World


def test_outer_step_is_the_papers_formula() -> None:
    """Quadratic losses |w - c_i|^2 / 2 by SGD: one inner step and Reptile = one step of joint SGD at rate eps * alpha."""
    w, alpha, eps = torch.tensor([1.0, -2.0]), 0.1, 0.5
    centres = [torch.tensor([3.0, 0.0]), torch.tensor([-1.0, 1.0])]
    adapted = [{"net": {"w": w - alpha * (w - c)}} for c in centres]
    joint = w - eps * alpha * torch.stack([w - c for c in centres]).mean(0)
    torch.testing.assert_close(outer_step({"net": {"w": w}}, adapted, eps)["net"]["w"], joint)
    mean = outer_step({"net": {"w": w}}, adapted, 1.0)["net"]["w"]
    torch.testing.assert_close(mean, torch.stack([a["net"]["w"] for a in adapted]).mean(0))


def prepared(root: Path) -> tuple[TrainingRecipe, Path]:
    recipe = toy_recipe(root, images=16)
    return recipe, pretrain(recipe, toy_set(root / "source"), root / "run", World())


def test_tasks_in_any_order_and_process_give_the_same_weights(tmp_path: Path) -> None:
    recipe, start = prepared(tmp_path)
    source = toy_set(tmp_path / "again")

    def backwards(inner, loop: InnerLoop, tasks):  # type: ignore[no-untyped-def]
        with ThreadPoolExecutor(1) as pool:
            futures = [pool.submit(inner, loop, task) for task in reversed(tasks)]
            return [future.result() for future in reversed(futures)]

    sha = checkpoint_hash(start)
    one = metatrain(recipe, source, tmp_path / "a", start, sha)
    other = metatrain(recipe, source, tmp_path / "b", start, sha, map_tasks=backwards)
    first, second = load_checkpoint(one)[0], load_checkpoint(other)[0]
    assert one.name == f"step-{3 * 2 * 2 * 4:012d}"
    for stem in first:
        assert all(torch.equal(first[stem][name], second[stem][name]) for name in first[stem])
    before = load_checkpoint(start)[0]
    for stem, origin in (("generator", "generator_ema"), ("discriminator", "discriminator")):
        assert all(not torch.equal(first[stem][name], before[origin][name]) for name in first[stem])


def test_meta_training_resumes_to_the_same_end(tmp_path: Path) -> None:
    recipe, start = prepared(tmp_path)
    source, sha = toy_set(tmp_path / "again"), checkpoint_hash(start)
    whole = metatrain(recipe, source, tmp_path / "a", start, sha)
    short = TrainingRecipe.model_validate(recipe.model_dump() | {"meta": recipe.meta.model_dump() | {"steps": 2}})
    metatrain(short, source, tmp_path / "b", start, sha)
    resumed = metatrain(recipe, source, tmp_path / "b", start, sha)
    assert resumed.parent.name == whole.parent.name
    for stem, named in load_checkpoint(whole)[0].items():
        assert all(torch.equal(value, load_checkpoint(resumed)[0][stem][name]) for name, value in named.items())


def test_a_task_trains_on_its_own_class_only(tmp_path: Path) -> None:
    recipe, start = prepared(tmp_path)
    source = toy_set(tmp_path / "again")
    tasks = draw_tasks(recipe, source, 0)
    assert {task.label for task in tasks} == {0, 1}
    assert draw_tasks(recipe, source, 0) == tasks != draw_tasks(recipe, source, 1)
    tensors, _ = load_checkpoint(start, ("generator_ema", "discriminator"))
    loop = InnerLoop(recipe, {"generator": tensors["generator_ema"], "discriminator": tensors["discriminator"]})
    results = [adapt_to_task(loop, task) for task in tasks]
    first, second = (result.weights["discriminator"]["head.weight"] for result in results)
    assert not torch.equal(first, second)
    assert "generator/adversarial" in results[0].metrics
