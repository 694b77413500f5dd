"""First-order MAML: the closed form, and that it is MAML with the second-order term dropped."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch

from data_shards import Batch as Images
from data_shards import batches
from tests.toy import toy_set
from tests.training.meta.points import ONE_NETWORK, Point, centre_of, images, inner_loop
from tests.training.models.make import LATENT, small_gan
from training.augment import NO_AUGMENTATION
from training.families import gan_phases
from training.loop import drawn
from training.meta import Inner, fomaml
from training.meta.maml import meta_gradients
from training.meta.rule import query_batch
from training.recipe import TrainingConfig

PHASES = ONE_NETWORK.phases(TrainingConfig(images=1), NO_AUGMENTATION)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_gradient_of_a_quadratic_is_that_at_the_adapted_weights(steps: int) -> None:
    found, metrics = fomaml.gradients(inner_loop({"generator": Point(0.5, -1.0)}, PHASES, images(204), images(51, 51),
                                                 steps=steps, lr=0.1))
    adapted = centre_of(204) + (1 - 0.1) ** steps * (0.5 - centre_of(204))
    assert found["generator"]["body"].item() == pytest.approx(adapted - centre_of(51), rel=1e-5)
    adapted = -centre_of(204) + (1 - 0.1 * 2) ** steps * (-1.0 + centre_of(204))
    assert found["generator"]["head"].item() == pytest.approx(2 * (adapted + centre_of(51)), rel=1e-5)
    assert {"generator/adversarial", "generator/query"} <= metrics.keys()


@pytest.mark.parametrize("parts", [["*"], ["generator.blocks.*", "discriminator.head.*"]])
def test_it_is_maml_with_the_second_order_term_dropped(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    """Its inner loop is that of all training, MAML's is written apart: both from the same draws, for a GAN with R1 and R2."""
    source = toy_set(tmp_path_factory.mktemp("root") / "source")
    feed = batches(source, batch=4, seed=1, streams=1)
    support: list[Images] = [next(feed) for _ in range(3)]
    queries = next(feed)
    networks = dict(zip(("generator", "discriminator"), small_gan("dcgan"), strict=True))
    weights = {"r1": 1.0, "r2": 0.5}

    def inner() -> Inner:
        made = inner_loop(copy.deepcopy(networks), gan_phases("relativistic"), support[0], queries, steps=3, lr=0.02,
                          parts=parts, latent_dim=LATENT, weights=weights)
        return replace(made, support=itertools.cycle(support))

    ours, _ = fomaml.gradients(inner())
    task = inner()
    given = [drawn(next(task.support), task.phases, task.plan, at=at) for at in (0, 4, 8)]
    adapted = {name: [key for key, _ in network.named_parameters()
                      if parts == ["*"] or key.startswith("blocks" if name == "generator" else "head")]
               for name, network in networks.items()}
    query = query_batch(task)
    first, exact = (meta_gradients(task.networks, task.phases, given, query, lr=dict.fromkeys(networks, 0.02), adapted=adapted,
                                   second_order=order)[0] for order in (False, True))
    largest = max(value.abs().max().item() for named in first.values() for value in named.values())
    apart = 0.0
    for name, named in first.items():
        for key, value in named.items():
            torch.testing.assert_close(ours[name][key], value, rtol=1e-4, atol=1e-5 * largest)
            apart = max(apart, (exact[name][key] - value).abs().max().item())
    assert apart > 1e-2 * largest, "the second order is not nothing here"
