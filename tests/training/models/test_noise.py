"""Random numbers hashed from latents."""

from __future__ import annotations

import torch
from scipy import stats

from tests.training.models.make import latents
from training.models import noise


def test_numbers_are_uniform_and_normal() -> None:
    z = latents(64)
    assert stats.kstest(noise.uniform(z, 0, 2000).flatten().double().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(noise.normal(z, 0, 2000).flatten().double().numpy(), "norm").pvalue > 1e-3
    assert float(noise.uniform(z, 3, 50_000).min()) > 0
    assert float(noise.uniform(z, 3, 50_000).max()) < 1


def test_samples_streams_and_places_are_independent() -> None:
    z = latents(200)
    fields = noise.normal(z, 0, 300)
    limit = 6 / 300**0.5
    between = torch.corrcoef(fields) - torch.eye(200)
    assert float(between.abs().max()) < limit
    along = torch.corrcoef(fields.T) - torch.eye(300)
    assert float(along.abs().max()) < 6 / 200**0.5
    other = noise.normal(z, 1, 300)
    assert float(torch.corrcoef(torch.stack([fields.flatten(), other.flatten()]))[0, 1].abs()) < 6 / 60_000**0.5


def test_a_sample_has_its_own_numbers_wherever_it_stands() -> None:
    z = latents(8)
    whole = noise.normal(z, 2, 10)
    assert torch.equal(noise.normal(z[3:4], 2, 10)[0], whole[3])
    assert torch.equal(noise.normal(z.flip(0), 2, 10), whole.flip(0))
    assert torch.equal(noise.normal(z, 2, 4), noise.normal(z.clone(), 2, 4))


def test_any_change_of_a_latent_draws_anew() -> None:
    z = latents(1).expand(6, -1).clone()
    for place in range(6):
        z[place, place] = torch.nextafter(z[place, place], torch.tensor(9.0))
    fields = noise.normal(torch.cat([z, latents(1)]), 0, 400)
    assert float((torch.corrcoef(fields) - torch.eye(7)).abs().max()) < 6 / 400**0.5
    swapped = latents(1)[:, [1, 0, 2, 3, 4, 5]]
    assert not torch.allclose(noise.normal(swapped, 0, 10), noise.normal(latents(1), 0, 10))
