"""Synthetic data out: a generated set is a source like any other, and says where it comes from."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data_shards import UserError, batches, load_images, open_set
from tests.toy import toy_recipe, toy_set
from training.checkpoint import checkpoint_hash
from training.draws import latents
from training.models.style import Generator
from training.pictures import to_uint8
from training.pretrain import pretrain
from training.sample import averaged_generator, sample_grid, sample_shards, truncated
from training.world import World


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return pretrain(toy_recipe(tmp_path, images=16), toy_set(tmp_path / "source"), tmp_path / "run", World())


def test_a_generated_set_is_a_source_with_provenance(checkpoint: Path, tmp_path: Path) -> None:
    made = sample_shards(checkpoint, str(tmp_path / "synthetic"), 300, seed=4, truncation=1.0)
    assert made.manifest.provenance == {
        "checkpoint": f"run/pretrain/{checkpoint.name}", "checkpoint_sha256": checkpoint_hash(checkpoint), "images_seen": 16,
        "network": "generator_ema", "seed": 4, "truncation": 1.0}
    assert open_set(tmp_path / "synthetic").manifest == made.manifest and len(made) == 300
    shorter = sample_shards(checkpoint, str(tmp_path / "shorter"), 20, seed=4, truncation=1.0)
    assert torch.equal(load_images(shorter, np.arange(20))[0], load_images(made, np.arange(20))[0]), "image i is image i"
    other = sample_shards(checkpoint, str(tmp_path / "other"), 20, seed=4)
    assert not torch.equal(load_images(other, np.arange(20))[0], load_images(made, np.arange(20))[0])
    assert next(islice(batches(made, batch=8, seed=0), 1)).images.shape == (8, 1, 16, 16)
    recipe = toy_recipe(tmp_path, images=16)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": "synthetic"})})
    assert pretrain(recipe, made, tmp_path / "second", World()).is_dir()


def test_truncation_is_the_cut_normal_distribution_rank_by_rank() -> None:
    z = latents(0, "test", 0, 4000, 5)
    cut = truncated(z, 0.7)
    assert cut.abs().max() <= 0.7 and cut.dtype == z.dtype
    assert bool((cut.flatten()[z.flatten().argsort()].diff() >= 0).all()), "monotone"
    # Closed form: the variance of a standard normal cut off at +-t is 1 - 2 t phi(t) / (2 Phi(t) - 1).
    t, normal = torch.tensor(0.7), torch.distributions.Normal(0.0, 1.0)
    expected = 1 - 2 * t * normal.log_prob(t).exp() / (2 * normal.cdf(t) - 1)
    assert cut.var() == pytest.approx(expected.item(), rel=0.03)
    assert torch.allclose(truncated(z, 30.0), z, atol=1e-5) and truncated(z, None) is z
    with pytest.raises(UserError, match="truncation 0"):
        truncated(z, 0.0)


def test_a_generator_with_styles_is_truncated_in_w(tmp_path: Path) -> None:
    """Images of mean + psi (w - mean) by hand; psi = 0 is one image but for its noise, and provenance says psi."""
    recipe = toy_recipe(tmp_path, images=16, generator={"model": "style", "channels": 4, "latent_dim": 4,
                                                        "style": {"dim": 8, "noise": False}})
    checkpoint = pretrain(recipe, toy_set(tmp_path / "source"), tmp_path / "run", World())
    network, _, _ = averaged_generator(checkpoint)
    assert isinstance(network, Generator)
    network.eval()
    z = latents(4, "synthetic", 0, 256, 4)
    for psi in (0.0, 0.6):
        made = sample_shards(checkpoint, str(tmp_path / f"psi-{psi}"), 20, seed=4, truncation=psi)
        with torch.no_grad():
            mean = network.mean_style()
            styles = mean + psi * (network.styles(z) - mean)
            expected = to_uint8(network.synthesis(styles[:, None].expand(-1, len(network.blocks), -1), z))[:20]
        found = load_images(made, np.arange(20))[0]
        assert int((found.int() - expected.int()).abs().max()) <= 1, "rounding"
        assert made.manifest.provenance["psi"] == psi and "truncation" not in made.manifest.provenance
        assert psi or bool((found == found[:1]).all())
    whole = sample_shards(checkpoint, str(tmp_path / "whole"), 20, seed=4)
    one = sample_shards(checkpoint, str(tmp_path / "one"), 20, seed=4, truncation=1.0)
    assert torch.equal(load_images(whole, np.arange(20))[0], load_images(one, np.arange(20))[0])
    assert not torch.equal(load_images(whole, np.arange(20))[0], found)
    sample_grid(checkpoint, tmp_path / "grid.png", 4, truncation=0.5)
    with pytest.raises(UserError, match=r"truncation -1.0 of a generator with styles must be at least 0"):
        sample_grid(checkpoint, tmp_path / "grid.png", 4, truncation=-1.0)
