"""reptile, fomaml and maml: trials that begin from weights which their own rule meta-learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.toy import toy_set, toy_tree
from training.checkpoint import checkpoint_hash, load_checkpoint
from training.config import apply_overrides
from training.meta import RULES
from training.meta.metatrain import metatrain
from training.methods import METHODS
from training.metrics.encoder import save_encoder, train_encoder
from training.pretrain import pretrain
from training.recipe import TrainingRecipe
from training.trial import Trial, run_trial
from training.world import World

META: dict[str, dict[str, Any]] = {
    "reptile": {}, "fomaml": {"rule": "fomaml", "outer_lr": 1e-2},
    "maml": {"rule": "maml", "inner_optimizer": "sgd", "outer_lr": 1e-2}}


def recipe_of(root: Path, **values: Any) -> TrainingRecipe:
    return TrainingRecipe.model_validate(apply_overrides(toy_tree(root), values))


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Meta-trained checkpoints by rule, in a run with an encoder and a target set beside it."""
    root = tmp_path_factory.mktemp("root")
    source, run = toy_set(root / "source"), root / "run"
    toy_set(root / "target", train=24, reference=24, seed=5)
    pretrained = pretrain(recipe_of(root), source, run, World())
    images = torch.zeros(16, 1, 16, 16, dtype=torch.uint8)
    images[::2] = 255
    save_encoder(train_encoder(images, torch.arange(16) % 2, classes=2, seed=0, images_budget=64, threads=1),
                 run / "encoder.safetensors")
    return {rule: metatrain(recipe_of(root, **{f"meta.{key}": value for key, value in meta.items()}), source, run, pretrained,
                            checkpoint_hash(pretrained)) for rule, meta in META.items()}


def test_every_rule_has_its_method() -> None:
    assert {name: method.weights for name, method in METHODS.items() if method.start == "meta"} == {rule: rule for rule in META}
    assert META.keys() == RULES.keys()
    assert METHODS["scratch"].weights == "scratch"
    assert METHODS["finetune"].weights == "pretrain"


@pytest.mark.parametrize("method", META)
def test_a_trial_begins_with_the_meta_learned_weights_of_all_networks(starts: dict[str, Path], method: str) -> None:
    start = starts[method]
    run = start.parents[2]
    trial = Trial("bars", str(run.parent / "target"), method, 1, "search", f"meta:{start.parent.name}", str(start),
                  checkpoint_hash(start))
    still = recipe_of(run.parent, **{"adaptation.lr": 0.0, "adaptation.images": 4})
    row = run_trial(trial, still, run, until=4)
    assert (row["status"], row["start"]) == ("finished", f"meta:{start.parent.name}")
    began, learned = load_checkpoint(run / row["checkpoint"])[0], load_checkpoint(start)[0]
    for network in ("generator", "discriminator"):
        assert all(torch.equal(value, learned[network][key]) for key, value in began[network].items())
    row = run_trial(trial, recipe_of(run.parent), run, until=32)
    moved = load_checkpoint(run / row["checkpoint"])[0]
    assert all(not torch.equal(value, learned["generator"][key]) for key, value in moved["generator"].items()), "it trains all"
