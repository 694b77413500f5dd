"""A new class of a class-conditional source, from few images."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from data_shards import UserError
from tests.training.methods.start import SMALL, adaptation_of, recipe_of, start_of, trial_of, weights_of
from training.checkpoint import checkpoint_hash, save_checkpoint
from training.methods import METHODS
from training.methods.kernels import merged
from training.trial import run_trial, trial_id


@pytest.mark.parametrize("model", SMALL)
def test_only_class_tables_of_g_train_and_begin_where_they_were(tmp_path: Path, model: str) -> None:
    recipe = recipe_of(tmp_path, {"training.generator.classes": 2}, model)
    networks = start_of(recipe)
    before = copy.deepcopy(networks["generator"])
    METHODS["newclass"].prepare(networks, adaptation_of(recipe, networks))
    trained = [name for name, p in networks["generator"].named_parameters() if p.requires_grad]
    assert trained and all("class_embedding" in name for name in trained)
    assert all(p.requires_grad for p in networks["discriminator"].parameters())
    z, labels = torch.randn(3, 4), torch.tensor([0, 1, 1])
    assert torch.equal(networks["generator"](z, labels), before(z, labels))
    now = merged(networks["generator"])
    assert now.keys() == before.state_dict().keys()
    assert all(torch.equal(now[name], value) for name, value in before.state_dict().items())


def test_a_step_on_a_row_is_as_much_longer_as_the_rate_says(tmp_path: Path) -> None:
    """Adam's first step is the learning rate, whatever the gradient: on the row it is rate times that."""
    recipe = recipe_of(tmp_path, {"training.generator.classes": 2, "adaptation.newclass.rate": 20.0})
    networks = start_of(recipe)
    METHODS["newclass"].prepare(networks, adaptation_of(recipe, networks))
    before = merged(networks["generator"])
    trained = [p for p in networks["generator"].parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3)
    networks["generator"](torch.randn(4, 4), torch.tensor([0, 0, 0, 0])).sum().backward()
    optimizer.step()
    after = merged(networks["generator"])
    moved = {name: after[name] - value for name, value in before.items() if not torch.equal(after[name], value)}
    assert moved and all("class_embedding" in name for name in moved)
    for step in moved.values():
        seen = step[0][step[0] != 0].abs()
        torch.testing.assert_close(seen, torch.full_like(seen, 0.02), rtol=1e-3, atol=1e-6)
        assert not step[1].any(), "the class that was not drawn stays"


def test_a_trial_of_a_class_that_the_source_has_not_seen(run: Path) -> None:
    recipe = recipe_of(run.parent, {"training.generator.classes": 2})
    networks = start_of(recipe)
    folder = run / "starts" / "told"
    save_checkpoint(folder, {"generator_ema": networks["generator"].state_dict(), "discriminator": networks[
        "discriminator"].state_dict()}, {"images": 0, "recipe": recipe.model_dump(mode="json"), "classes": ["square", "ring"]})
    trial = trial_of(run, recipe, "newclass", checkpoint=str(folder), checkpoint_sha256=checkpoint_hash(folder))
    row = run_trial(trial, recipe, run, until=32)
    assert row["status"] == "finished"
    ours, source = weights_of(run, trial, recipe)["generator_ema"], networks["generator"].state_dict()
    for name, value in ours.items():
        if "class_embedding" in name:
            mean = source[name].mean(0, keepdim=True)
            assert value.shape[0] == 2 and not torch.equal(value, mean.expand_as(value))
        else:
            assert torch.equal(value, source[name]), name
    other = recipe_of(run.parent, {"training.generator.classes": 2, "adaptation.newclass.rate": 3.0})
    assert trial_id(trial, recipe) != trial_id(trial, other)


def test_a_source_that_was_told_no_classes_is_refused(run: Path) -> None:
    recipe = recipe_of(run.parent)
    with pytest.raises(UserError, match=r"training\.generator\.classes is 0; set it to the number of the source's classes"):
        run_trial(trial_of(run, recipe, "newclass"), recipe, run, until=8)
