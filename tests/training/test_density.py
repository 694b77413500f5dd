"""The density baseline: sampler and likelihood against closed forms, the fit against scikit-learn's, its row and checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture as SklearnMixture
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from cluster.recipe import Recipe
from data_shards import UserError, load_images, open_set
from tests.ranks import run_ranks
from tests.toy import toy_recipe, toy_set, toy_tree
from training.checkpoint import latest_valid
from training.config import apply_overrides
from training.draws import latents
from training.events import read_events
from training.families import FAMILIES
from training.families.density import GaussianMixture, fit
from training.methods import METHODS
from training.metrics.encoder import save_encoder, train_encoder
from training.pretrain import finished_pretraining, first_images, pretrain
from training.recipe import RECIPES_FOLDER, TrainingRecipe, read_recipe
from training.sample import averaged_generator, sample_grid
from training.source import source_parts
from training.trial import Trial, rescore, run_trial
from training.world import World
from tune_spaces.plan import races

SHAPE, GAUSSIANS, COMPONENTS = (1, 2, 3), 3, 2


def by_hand() -> tuple[GaussianMixture, MixtureSameFamily]:
    """A mixture of known parameters, and torch's own of the same ones, on the components."""
    draw = torch.Generator().manual_seed(0)
    network = GaussianMixture(SHAPE, GAUSSIANS, COMPONENTS)
    directions = torch.linalg.qr(torch.randn(6, COMPONENTS, generator=draw))[0].T
    network.mean.copy_(0.1 * torch.randn(6, generator=draw))
    network.basis.copy_(torch.tensor([[0.12], [0.06]]) * directions)
    network.weights.copy_(torch.tensor([0.5, 0.2, 0.3]))
    network.means.copy_(torch.randn(GAUSSIANS, COMPONENTS, generator=draw))
    network.cholesky.copy_(torch.tensor([[[0.9, 0.0], [0.3, 0.4]], [[0.2, 0.0], [-0.1, 0.8]], [[0.5, 0.0], [0.0, 0.5]]]))
    return network, MixtureSameFamily(Categorical(network.weights),
                                      MultivariateNormal(network.means, scale_tril=network.cholesky))


def some_images(count: int, seed: int = 0) -> Tensor:
    """uint8 (count, 1, 6, 6): two clusters."""
    draw = torch.Generator().manual_seed(seed)
    values = 90 + 60 * (torch.arange(count) % 2)[:, None] + 12 * torch.randn(count, 36, generator=draw)
    return values.clamp(0, 255).round().to(torch.uint8).view(count, 1, 6, 6)


def recipe_of(root: Path, **density: object) -> TrainingRecipe:
    return toy_recipe(root, family="density", density={"images_per_gaussian": 20, **density})


def test_samples_have_the_mixtures_moments() -> None:
    """Mean and covariance of 200,000 samples against the closed form; |x| stays below 1, so that nothing is cut off."""
    network, _ = by_hand()
    samples = network(latents(0, "test", 0, 200_000, 1 + COMPONENTS)).flatten(1).double()
    assert samples.abs().max() < 1
    weights, means = network.weights.double(), network.means.double()
    mean = weights @ means
    inner = (network.cholesky @ network.cholesky.mT).double() + means[:, :, None] * means[:, None]
    covariance = (weights[:, None, None] * inner).sum(0) - mean[:, None] * mean[None]
    basis = network.basis.double()
    torch.testing.assert_close(samples.mean(0), network.mean.double() + mean @ basis, atol=2e-3, rtol=0)
    torch.testing.assert_close(samples.T.cov(), basis.T @ covariance @ basis, atol=2e-4, rtol=0)


def test_the_first_normal_chooses_the_gaussian_by_its_weight() -> None:
    network, _ = by_hand()
    network.cholesky.zero_()  # each Gaussian a point
    z = latents(0, "test", 0, 50_000, 1 + COMPONENTS)
    points = network.mean + network.means @ network.basis
    chosen = torch.cdist(network(z).flatten(1), points).argmin(1)
    torch.testing.assert_close(chosen.bincount() / len(z), network.weights, atol=0.01, rtol=0)
    assert (chosen[z[:, 0] < 0] == 0).all() and (chosen[z[:, 0] > 0] > 0).all()  # weight 0.5 comes first
    far = torch.zeros(2, 1 + COMPONENTS)
    far[:, 0] = torch.tensor([-40.0, 40.0])
    assert torch.equal(network(far).flatten(1), points[[0, 2]])


def test_the_log_likelihood_is_the_mixtures() -> None:
    network, closed = by_hand()
    images = network(latents(0, "test", 0, 50, 1 + COMPONENTS))
    coordinates = network.coordinates(images)
    torch.testing.assert_close(network.mean + coordinates @ network.basis, images.flatten(1))
    torch.testing.assert_close(network.log_likelihood(images), closed.log_prob(coordinates).double(), rtol=1e-5, atol=1e-5)


def test_a_fit_scores_as_scikit_learns_own(tmp_path: Path) -> None:
    """On images that were not fitted, too; the recipe's own numbers decide how many Gaussians there are."""
    recipe, images, others = recipe_of(tmp_path), some_images(64), some_images(40, seed=1)
    network = GaussianMixture((1, 6, 6), 10, 3)
    found = fit(network, recipe.training, images, 0)
    assert (found["generator/gaussians"], found["generator/components"]) == (3, 3)  # 64 images, 20 to each
    pca = PCA(3, whiten=True, random_state=0)
    signed = [(part.double() / 127.5 - 1).flatten(1) for part in (images, others)]
    model = SklearnMixture(3, reg_covar=0.05, random_state=0, max_iter=200).fit(pca.fit_transform(signed[0].numpy()))
    for part in signed:
        expected = torch.from_numpy(model.score_samples(pca.transform(part.numpy())))
        torch.testing.assert_close(network.log_likelihood(part.float()), expected, rtol=1e-4, atol=1e-4)
    assert found["generator/log_likelihood"] == pytest.approx(float(network.log_likelihood(signed[0].float()).mean()), rel=1e-4)
    torch.testing.assert_close(network.weights.sum(), torch.tensor(1.0))
    assert not network.weights[3:].any()


def test_ten_images_are_one_regularised_gaussian(tmp_path: Path) -> None:
    """Nine components at most, more variance than the images by the ridge, and no copies."""
    network, images = GaussianMixture((1, 6, 6), 10, 20), some_images(10)
    found = fit(network, toy_recipe(tmp_path).training, images, 0)
    assert (found["generator/gaussians"], found["generator/components"]) == (1, 9)
    samples = network(latents(0, "test", 0, 20_000, 21)).flatten(1)
    real = (images.float() / 127.5 - 1).flatten(1)
    torch.testing.assert_close(samples.mean(0), real.mean(0), atol=0.01, rtol=0)
    assert float(samples.var(0).sum() / real.var(0).sum()) == pytest.approx(0.9 + 0.05, abs=0.02)  # EM divides by 10, not by 9
    nearest = torch.cdist(samples, real).min(1).values.mean()
    assert nearest > 0.5 * torch.cdist(real, real).fill_diagonal_(math.inf).min(1).values.mean()


def test_images_that_are_alike_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="all alike"):
        fit(GaussianMixture((1, 6, 6), 10, 3), toy_recipe(tmp_path).training, some_images(1).repeat(8, 1, 1, 1), 0)


def test_pretraining_fits_the_first_images_of_the_order(tmp_path: Path) -> None:
    source, recipe = toy_set(tmp_path / "source"), recipe_of(tmp_path, images=40)
    checkpoint = pretrain(recipe, source, tmp_path / "run", World())
    assert checkpoint.name == "step-000000000064" and finished_pretraining(recipe, source, tmp_path / "run" / "pretrain")
    network, _, state = averaged_generator(checkpoint)
    images = first_images(recipe, source_parts(recipe.data, source), 40)
    expected = GaussianMixture((1, 16, 16), 10, 3)
    found = fit(expected, recipe.training, images, recipe.seed)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in expected.state_dict().items())
    (event,) = read_events(tmp_path / "run" / "pretrain" / "events.jsonl")
    assert event["images"] == 64 and event["metrics"]["generator/log_likelihood"] == found["generator/log_likelihood"]
    assert state["metrics"]["generator/gaussians"] == 2
    assert (checkpoint.parent / "samples.png").exists()
    sample_grid(checkpoint, tmp_path / "grid.png", 16)
    # The same call again fits nothing, and more images are another fit.
    assert pretrain(recipe, source, tmp_path / "run", World()) == checkpoint
    longer = recipe.model_copy(update={"training": recipe.training.model_copy(update={"images": 80})})
    assert pretrain(longer, source, tmp_path / "run", World()).name == "step-000000000080"


def _pretrained(world: World, root: str) -> list[str]:
    pretrain(recipe_of(Path(root)), open_set(Path(root) / "source"), Path(root) / "ranks", world)
    return []


def test_two_ranks_fit_what_one_does(tmp_path: Path) -> None:
    source = toy_set(tmp_path / "source")
    pretrain(recipe_of(tmp_path), source, tmp_path / "one", World())
    run_ranks(_pretrained, 2, str(tmp_path))
    one, two = (averaged_generator(found)[0].state_dict() for run in ("one", "ranks")
                if (found := latest_valid(tmp_path / run / "pretrain")))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder and a target set, and no source model."""
    root = tmp_path_factory.mktemp("root")
    images, labels = load_images(source := toy_set(root / "source"), source.indices())
    toy_set(root / "target", train=24, reference=24, seed=5)
    (root / "run").mkdir()
    save_encoder(train_encoder(images, labels, classes=2, seed=0, images_budget=512, threads=1),
                 root / "run" / "encoder.safetensors")
    return root / "run"


def fanout_recipe(root: Path, **changes: Any) -> Recipe:
    tree = apply_overrides(toy_tree(root), {
        "training.engine": {"zero": {"generator": 3, "discriminator": 2}}, "training.objective.pack": 2,
        "adaptation.augmentation": {"kind": "diffaugment", "p": 0.5}, "adaptation.shots": 10,
        "fanout": {"targets": [{"set": "target"}], "methods": ["scratch", "density"], "space": {"lr": [1e-4, 1e-3]},
                   "candidates": 2, "rungs": 1, "seeds": 2}, **changes})
    return Recipe.model_validate(tree)


def test_a_fan_out_of_gans_has_its_row(run: Path) -> None:
    """Its search is one trial, the others keep their two; its final rows are scored like theirs."""
    from cluster.leaderboard import build_leaderboard
    from tune_spaces.plan import ready_jobs

    recipe, rows = fanout_recipe(run.parent), dict[str, dict[str, Any]]()
    plan = races(recipe, recipe.fanout, {})
    assert [len(race.search) for race in plan] == [2, 1]
    for race in plan:
        while jobs := ready_jobs(race, rows):
            for job in jobs:
                rows[job.identity] = run_trial(job.trial, recipe, run, until=job.until)
    board = build_leaderboard(recipe, run, list(rows.values()), {})
    finals = [row for row in board["rows"] if row["method"] == "density" and row["phase"] == "final"]
    assert len(finals) == 2 and all(row["status"] == "finished" and row["start"] == "scratch" for row in finals)
    assert all(isinstance(row[name], float) for row in finals for name in ("kid", "fd", "coverage", "copy_rate"))
    (verdict,) = [verdict for verdict in board["verdicts"] if verdict["method"] == "density"]
    assert verdict["seeds"] == 2 and verdict["verdict"] is not None
    # Its checkpoint is a generator like any other, and holds the fit of the support images.
    network, own, _ = averaged_generator(run / finals[0]["checkpoint"])
    assert own.training.family == "density" and isinstance(network, GaussianMixture)
    again = rescore(finals[0], recipe, run, set_path=str(run.parent / "target"), net="encoder")
    assert again["kid"] == finals[0]["kid"]
    json.dumps(board, allow_nan=False)


def test_nothing_begins_from_it(run: Path) -> None:
    own = METHODS["density"].settings
    with pytest.raises(ValueError, match="the method finetune begins from other weights, which the family density"):
        fanout_recipe(run.parent, **own, **{"fanout.methods": ["scratch", "finetune"]})
    recipe = fanout_recipe(run.parent, **own)
    trial = Trial("bars", str(run.parent / "target"), "scratch", 1, "final", "scratch", None, None)
    rows = [run_trial(Trial(**{**vars(trial), "method": method}), recipe, run, until=32) for method in ("scratch", "density")]
    assert rows[0]["kid"] == rows[1]["kid"]  # in its own family the control is the baseline itself


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES_FOLDER.glob("*.yaml")))
def test_it_can_stand_beside_any_recipe_of_pictures(name: str) -> None:
    recipe = read_recipe(TrainingRecipe, name)
    if not FAMILIES[recipe.training.family].drawn:
        tree = apply_overrides(recipe.model_dump(mode="json"), METHODS["density"].settings)
        assert TrainingRecipe.model_validate(tree).training.family == "density"


def test_a_latent_without_components_is_refused(tmp_path: Path) -> None:
    source = toy_set(tmp_path / "source")
    recipe = toy_recipe(tmp_path, family="density", generator={"latent_dim": 1})
    with pytest.raises(UserError, match="use 2 or more"):
        pretrain(recipe, source, tmp_path / "run", World())
