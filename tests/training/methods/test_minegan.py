"""MineGAN: the miner starts as the identity, trains alone while it should, and travels with its generator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_shards import UserError
from tests.training.methods.start import SMALL, recipe_of, start_of, trial_of, weights_of
from tests.training.models.make import latents, stir
from training.checkpoint import load_checkpoint, save_checkpoint
from training.draws import latents as draw_latents
from training.networks import load_start, make_networks
from training.pictures import generate
from training.sample import averaged_generator
from training.trial import run_trial

MINED = {"training.generator.miner_layers": 2}


@pytest.mark.parametrize("model", SMALL)
def test_a_plain_checkpoint_starts_a_mined_generator_as_it_was(tmp_path: Path, model: str) -> None:
    plain = start_of(recipe_of(tmp_path, model=model))
    save_checkpoint(tmp_path / "start", {("generator_ema" if name == "generator" else name): network.state_dict()
                                         for name, network in plain.items()}, {"images": 0})
    mined = make_networks(recipe_of(tmp_path, MINED, model).training, (1, 16, 16), 3)
    load_start(mined, tmp_path / "start")
    z = latents(4, dim=4)
    assert torch.equal(mined["generator"](z), plain["generator"](z))
    stir(mined["generator"].miner)  # type: ignore[arg-type]
    assert not torch.equal(mined["generator"](z), plain["generator"](z))
    assert torch.equal(mined["generator"](z), plain["generator"](mined["generator"].miner(z)))  # type: ignore[operator]


def test_a_missing_weight_is_still_refused(tmp_path: Path) -> None:
    plain = start_of(recipe_of(tmp_path))
    weights = {name: network.state_dict() for name, network in plain.items()}
    del weights["generator"]["project.weight"]
    save_checkpoint(tmp_path / "start", {"generator_ema": weights["generator"], "discriminator": weights["discriminator"]},
                    {"images": 0})
    with pytest.raises(UserError, match=r"project\.weight is not there and \(128, 4\) here"):
        load_start(make_networks(recipe_of(tmp_path, MINED).training, (1, 16, 16), 3), tmp_path / "start")


@pytest.mark.parametrize(("share", "moves"), [(1.0, False), (0.5, True), (0.0, True)])
def test_g_stays_bit_for_bit_until_it_is_fine_tuned(run: Path, share: float, moves: bool) -> None:
    recipe = recipe_of(run.parent, {"adaptation.minegan.share": share})
    source = start_of(recipe)["generator"].state_dict()
    for until, moved in ((16, moves and share < 0.5), (32, moves)):
        trial = trial_of(run, recipe, "minegan", domain=f"bars-{share}")
        row = run_trial(trial, recipe, run, until=until)
        assert row["images_seen"] == until
        ours = weights_of(run, trial, recipe)["generator"]
        assert any(not torch.equal(ours[name], value) for name, value in source.items()) is moved
        assert ours["miner.layers.1.weight"].abs().sum() > 0


def test_the_stage_of_the_miner_counts_in_the_budget(run: Path) -> None:
    """A rung that ends within the stage is reported after it, and the next one too."""
    recipe = recipe_of(run.parent, {"adaptation.minegan.share": 0.75})
    trial = trial_of(run, recipe, "minegan", domain="counted")
    rows = [run_trial(trial, recipe, run, until=until) for until in (8, 16, 32)]
    assert [row["images_seen"] for row in rows] == [24, 24, 32]
    assert [set(row["rungs"]) for row in rows] == [{"8"}, {"8", "16"}, {"8", "16", "32"}]


def test_its_checkpoint_samples_as_any_other(run: Path) -> None:
    recipe = recipe_of(run.parent)
    trial = trial_of(run, recipe, "minegan", phase="final", seed=4)
    row = run_trial(trial, recipe, run, until=32)
    network, own, _ = averaged_generator(run / row["checkpoint"])
    assert own.training.generator.miner_layers == 2
    weights = load_checkpoint(run / row["checkpoint"])[0]["generator_ema"]
    assert weights["miner.layers.1.weight"].abs().sum() > 0
    z = draw_latents(0, "test", 0, 8, 4)
    plain = make_networks(recipe.training, (1, 16, 16), 0)["generator"]
    plain.load_state_dict({name: value for name, value in weights.items() if not name.startswith("miner.")})
    assert torch.equal(generate(network, z), generate(plain, network.miner(z).detach()))  # type: ignore[operator]
