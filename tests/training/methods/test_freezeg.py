"""Frozen weights do not move, bit for bit, and what is said to be frozen is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from data_shards import UserError
from tests.training.methods.start import SMALL, adaptation_of, recipe_of, start_of, trial_of, weights_of
from training.freezing import freeze_matching
from training.methods import METHODS
from training.trial import run_trial


def moved(run: Path, settings: dict[str, Any], method: str) -> dict[str, set[str]]:
    """The weights of each network that a trial changed."""
    recipe = recipe_of(run.parent, settings)
    trial = trial_of(run, recipe, method)
    run_trial(trial, recipe, run, until=16)
    start, ours = start_of(recipe), weights_of(run, trial, recipe)
    changed = {name: {key for key, value in network.state_dict().items() if not torch.equal(value, ours[name][key])}
               for name, network in start.items()}
    assert changed["generator"] == {key for key, value in start["generator"].state_dict().items()
                                    if not torch.equal(value, ours["generator_ema"][key])}
    return changed


@pytest.mark.parametrize(("parts", "first"), [(["mapping"], "blocks.0"), (["mapping", "early"], "blocks.1"),
                                              (["late"], "project")])
def test_the_parts_stay_bit_for_bit_and_the_rest_moves(run: Path, parts: list[str], first: str) -> None:
    recipe = recipe_of(run.parent)
    names = {"mapping": ("project", "films.0"), "early": ("blocks.0", "films.1"), "late": ("blocks.1", "blocks.2")}
    frozen = tuple(prefix for part in parts for prefix in names[part])
    changed = moved(run, {"adaptation.freezeg.parts": parts}, "freezeg")["generator"]
    assert changed == {name for name in start_of(recipe)["generator"].state_dict() if not name.startswith(frozen)}
    assert f"{first}.weight" in changed


@pytest.mark.parametrize("model", SMALL)
def test_each_part_of_each_model_can_be_frozen(tmp_path: Path, model: str) -> None:
    counts = {}
    for part in ("mapping", "early", "late"):
        recipe = recipe_of(tmp_path, {"adaptation.freezeg.parts": [part]}, model)
        networks = start_of(recipe)
        if (model, part) == ("mlp", "mapping"):
            with pytest.raises(UserError, match="holds no weights of the generator mlp"):
                METHODS["freezeg"].prepare(networks, adaptation_of(recipe, networks))
            continue
        METHODS["freezeg"].prepare(networks, adaptation_of(recipe, networks))
        counts[part] = sum(p.numel() for p in networks["generator"].parameters() if not p.requires_grad)
    assert sum(counts.values()) == sum(p.numel() for p in networks["generator"].parameters())
    recipe = recipe_of(tmp_path, {"adaptation.freezeg.parts": ["mapping", "early", "late"]}, model)
    with pytest.raises(UserError, match="holds all weights"):
        METHODS["freezeg"].prepare(networks, adaptation_of(recipe, networks))


@pytest.mark.parametrize("method", ["finetune", "l2sp", "ewc", "distill"])
def test_patterns_freeze_in_any_method(run: Path, method: str) -> None:
    changed = moved(run, {"adaptation.frozen": ["generator.blocks.[01].*", "discriminator.*.bias"]}, method)
    start = start_of(recipe_of(run.parent))
    assert changed["generator"] == {name for name in start["generator"].state_dict()
                                    if not name.startswith(("blocks.0", "blocks.1"))}
    assert changed["discriminator"] == {name for name in start["discriminator"].state_dict() if not name.endswith("bias")}


def test_the_control_has_no_start_that_could_stay(run: Path) -> None:
    recipe = recipe_of(run.parent, {"adaptation.frozen": ["generator.blocks.*"]})
    rows = [run_trial(trial_of(run, given, "scratch"), given, run, until=16) for given in (recipe_of(run.parent), recipe)]
    assert rows[0]["trial"] != rows[1]["trial"] and rows[0]["selection_kid"] == rows[1]["selection_kid"]


@pytest.mark.parametrize(("pattern", "near"), [
    ("generator.bloks.*", r"generator\.blocks\.\*"), ("generator.project.wait", r"generator\.project\.weight"),
    ("discriminator", r"discriminator\.\*"), ("zzzz", r"generator\.\*, discriminator\.\*")])
def test_a_pattern_that_matches_nothing_is_refused_with_near_names(tmp_path: Path, pattern: str, near: str) -> None:
    networks = start_of(recipe_of(tmp_path))
    with pytest.raises(UserError, match=near):
        freeze_matching(networks, [pattern], networks)
    with pytest.raises(UserError, match="leaves nothing of the discriminator to train"):
        freeze_matching(networks, ["discriminator.*"], networks)


def test_a_weight_of_another_parameterisation_goes_by_its_plain_name() -> None:
    layer = nn.Linear(3, 2)
    known = {"generator": nn.Linear(3, 2)}
    parametrizations.weight_norm(layer)
    freeze_matching({"generator": layer}, ["generator.weight"], known)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"bias"}
    assert sum(1 for _ in layer.parameters()) == 3
