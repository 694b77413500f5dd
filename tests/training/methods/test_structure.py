"""Structure transfer: exactly training from scratch by the pretraining's settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.methods.start import recipe_of, trial_of, weights_of
from training.methods import METHODS
from training.recipe import TrainingRecipe
from training.trial import run_trial, trial_id
from tune_spaces.config import FanoutConfig
from tune_spaces.plan import races
from tune_spaces.space import Axis

SOURCE = {
    "training.images": 320, "training.generator.lr": [[0, 1e-3], [320, 1e-4]], "training.discriminator.lr": 5e-4,
    "training.generator.betas": [0.5, 0.9], "training.objective.r1": [[0, 4.0], [160, 2.0]], "training.objective.r2": 0.0,
    "training.augmentation.kind": "diffaugment", "training.augmentation.p": [[0, 0.0], [320, 0.6]],
    "training.discriminator.name": "adamw", "training.discriminator.every": 2}


def test_the_settings_are_the_pretrainings_shortened_to_the_trial() -> None:
    recipe = recipe_of(Path("root"), SOURCE)
    found = METHODS["structure"].derived(recipe)
    assert found["adaptation.optimizers"]["generator"]["lr"] == [[0, 1e-3], [32, 1e-4]]
    assert found["adaptation.optimizers"]["generator"]["betas"] == [0.5, 0.9]
    assert {key: found["adaptation.optimizers"]["discriminator"][key] for key in ("lr", "name", "every")} == {
        "lr": 5e-4, "name": "adamw", "every": 2}
    assert (found["adaptation.r1"], found["adaptation.r2"]) == ([[0, 4.0], [16, 2.0]], 0.0)
    assert found["adaptation.augmentation"]["p"] == [[0, 0.0], [32, 0.6]]
    assert found["adaptation.augmentation"]["kind"] == "diffaugment"
    assert found["adaptation.augmentation"]["speed_images"] == 50_000


def test_it_is_scratch_by_those_settings_and_nothing_else(run: Path) -> None:
    recipe = recipe_of(run.parent, SOURCE)
    trial = trial_of(run, recipe, "structure")
    assert (trial.start, trial.checkpoint) == ("scratch", None)
    run_trial(trial, recipe, run, until=32)
    by_hand = recipe_of(run.parent, {**SOURCE,
        "adaptation.r1": [[0, 4.0], [16, 2.0]], "adaptation.r2": 0.0,
        "adaptation.augmentation": {"kind": "diffaugment", "p": [[0, 0.0], [32, 0.6]], "speed_images": 50_000},
        "adaptation.optimizers.generator": {"lr": [[0, 1e-3], [32, 1e-4]], "betas": [0.5, 0.9]},
        "adaptation.optimizers.discriminator": {"lr": 5e-4, "name": "adamw", "every": 2}})
    control = trial_of(run, by_hand, "scratch")
    run_trial(control, by_hand, run, until=32)
    plain = trial_of(run, recipe, "scratch")
    run_trial(plain, recipe, run, until=32)
    ours, theirs, others = (weights_of(run, *found)["generator"] for found in (
        (trial, recipe), (control, by_hand), (plain, recipe)))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    kept = weights_of(run, trial, recipe)
    assert [kept[f"{network}_optimizer"]["step"].item() for network in ("generator", "discriminator")] == [8, 4]
    assert not torch.equal(ours["project.weight"], others["project.weight"])


def test_its_id_follows_the_length_of_the_pretraining(run: Path) -> None:
    one, other = recipe_of(run.parent, SOURCE), recipe_of(run.parent, {**SOURCE, "training.images": 640})
    assert trial_id(trial_of(run, one, "structure"), one) != trial_id(trial_of(run, other, "structure"), other)
    assert trial_id(trial_of(run, one, "scratch"), one) == trial_id(trial_of(run, other, "scratch"), other)


def test_nothing_is_searched_on_the_target_and_the_others_are_searched_as_ever(run: Path) -> None:
    recipe: TrainingRecipe = recipe_of(run.parent)
    space: dict[str, Axis] = {"lr": [1e-4, 2e-4], "r1": [0.1, 1.0]}
    fanout = FanoutConfig.model_validate({"targets": [{"set": str(run.parent / "target")}], "methods": ["scratch", "structure"],
                                          "space": space, "candidates": 4, "rungs": 2, "seeds": 2})
    found = {race.method: race for race in races(recipe, fanout, {})}
    assert (len(found["scratch"].search), found["scratch"].budgets) == (4, (16, 32))
    assert (len(found["structure"].search), found["structure"].budgets) == (1, (32,))
    assert len(found["structure"].finals[0]) == len(found["scratch"].finals[0]) == 2


def test_an_optimizer_of_an_unknown_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adaptation\.optimizers names 'generater'"):
        recipe_of(tmp_path, {"adaptation.optimizers.generater.lr": 1e-3})
