"""Rows that are there to compare with: the support set itself, and the source as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.leaderboard import verdicts_over
from data_shards import UserError
from tests.training.methods.start import SHAPE, pictures, recipe_of, start_of, trial_of
from training.checkpoint import load_checkpoint
from training.families.copier import Copier, keep
from training.metrics.kid import kid
from training.networks import make_networks
from training.pictures import generate
from training.sample import averaged_generator
from training.target import feature_net, load_target
from training.trial import rescore, run_trial


def test_the_copier_emits_its_support_images_evenly_and_is_disqualified(run: Path) -> None:
    recipe = recipe_of(run.parent, {"evaluation.samples": 200, "adaptation.conditional": True})
    trial = trial_of(run, recipe, "copier", phase="final")
    row = run_trial(trial, recipe, run, until=32)
    assert row["disqualified"] and row["copy_rate"] == 1.0 and row["intra_distance"] == pytest.approx(0, abs=1e-3)
    assert (row["status"], row["start"], row["empty_clusters"]) == ("finished", "scratch", 0)
    support = load_target(trial.set_path, 5, trial.seed).support
    network, own, _ = averaged_generator(run / row["checkpoint"])
    assert own.training.copier.images == 5
    images = generate(network, torch.randn(4000, 4, generator=torch.Generator().manual_seed(0)))
    counts = [(images == one).flatten(1).all(1).sum().item() for one in support]
    assert sum(counts) == 4000 and min(counts) > 700
    assert rescore(row, recipe, run, set_path=trial.set_path, net="encoder")["kid"] == row["kid"]


def test_the_copier_refuses_fewer_images_than_it_is_to_keep() -> None:
    from training.recipe import TrainingConfig

    with pytest.raises(UserError, match=r"to keep 7 images \(training\.copier\.images\), and there are 3; lower it"):
        keep(Copier(SHAPE, 7), TrainingConfig(images=1), (pictures(3) * 127).to(torch.uint8), 0)


def test_the_unadapted_row_is_the_source_bit_for_bit(run: Path) -> None:
    recipe = recipe_of(run.parent)
    trial = trial_of(run, recipe, "unadapted", phase="final")
    row = run_trial(trial, recipe, run, until=32)
    kept, source = load_checkpoint(run / row["checkpoint"])[0]["generator_ema"], start_of(recipe)["generator"].state_dict()
    assert all(torch.equal(kept[name], value) for name, value in source.items())
    # Its score is the source's own, taken here by hand.
    from training.draws import latents

    network = make_networks(recipe.training, SHAPE, 0)["generator"]
    network.load_state_dict(source)
    net = feature_net("encoder", str(run))
    fake = net.extract(generate(network, latents(trial.seed, "evaluation", 0, 32, 4)))
    reference = net.extract(load_target(trial.set_path, 5, trial.seed).reference)
    assert row["kid"] == pytest.approx(kid(fake, reference), rel=1e-6)


def test_rows_for_comparison_get_gains_and_no_verdict_and_cost_the_others_nothing() -> None:
    """Holm's correction counts the claims that are made, and these claim nothing."""
    kids = {"scratch": [9.0, 10.1, 11.2], "finetune": [4.0, 5.2, 6.1], "unadapted": [5.0, 7.0, 6.0], "copier": [1.0, 2.1, 1.4]}
    rows = [{"domain": "d", "method": method, "phase": "final", "seed": seed, "kid": value, "coverage": 0.5, "copy_rate": 0.0,
             "disqualified": method == "copier", "intra_distance": 2.0}
            for method, values in kids.items() for seed, value in enumerate(values)]
    found = {verdict["method"]: verdict for verdict in verdicts_over(rows, 0.05)}
    alone = {verdict["method"]: verdict for verdict in verdicts_over(
        [row for row in rows if row["method"] in ("scratch", "finetune")], 0.05)}
    assert found["finetune"] == alone["finetune"] and found["finetune"]["verdict"] == "positive"
    for method in ("unadapted", "copier"):
        assert found[method]["verdict"] is None and found[method]["gain_over_scratch"] > 0
    assert found["copier"]["disqualified"] == 3 and found["copier"]["intra_distance_mean"] == 2.0
