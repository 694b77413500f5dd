"""Reptile: the paper's formula, joint training as its limit, FIGR's outer Adam."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.training.meta.points import ONE_NETWORK, Point, centre_of, images, inner_loop
from training.augment import NO_AUGMENTATION
from training.engines import Engine
from training.meta import reptile
from training.meta.config import MetaConfig
from training.meta.metatrain import TaskResult, outer_engine, outer_step
from training.recipe import TrainingConfig

PHASES = ONE_NETWORK.phases(TrainingConfig(images=1), NO_AUGMENTATION)
GRAYS = (204, 30, 77)


def results(start: Point, *, steps: int, alpha: float) -> list[TaskResult]:
    """Of one task for each of the grays."""
    return [TaskResult(reptile.gradients(inner_loop({"generator": copy.deepcopy(start)}, PHASES, images(gray), images(0),
                                                    steps=steps, lr=alpha))[0], {"generator": {}}, {}) for gray in GRAYS]


def stepped(start: Point, found: list[TaskResult], lr: float, **config: object) -> tuple[Point, Engine]:
    shared = copy.deepcopy(start)
    engine = outer_engine(MetaConfig.model_validate(config), "generator", shared, None)
    outer_step({"generator": engine}, found, lr)
    return shared, engine


def test_the_outer_step_is_the_papers_formula() -> None:
    """phi <- phi + epsilon mean_i(phi_i - phi), phi_i being known: K steps on curvature a shrink by (1 - alpha a)^K."""
    start, steps, alpha, epsilon = Point(0.5, -1.0), 4, 0.1, 0.3
    shared, _ = stepped(start, results(start, steps=steps, alpha=alpha), epsilon)
    for got, phi, curvature, sign in ((shared.body, 0.5, 1.0, 1), (shared.head, -1.0, 2.0, -1)):
        ends = [sign * centre_of(gray) + (1 - alpha * curvature) ** steps * (phi - sign * centre_of(gray)) for gray in GRAYS]
        assert got.item() == pytest.approx(phi + epsilon * (sum(ends) / len(ends) - phi), rel=1e-5)


def test_with_one_inner_step_it_is_a_step_of_joint_training() -> None:
    """One step of gradient descent inside: joint gradient descent on all tasks' mean loss, at the rate epsilon alpha."""
    start, alpha, epsilon = Point(0.5, -1.0), 0.1, 0.7
    shared, _ = stepped(start, results(start, steps=1, alpha=alpha), epsilon)
    joint = copy.deepcopy(start)
    losses = [((joint.body - centre_of(gray)).square() / 2 + (joint.head + centre_of(gray)).square()).sum() for gray in GRAYS]
    torch.stack(losses).mean().backward()
    for got, parameter in zip(shared.parameters(), joint.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(got, parameter - epsilon * alpha * parameter.grad, rtol=1e-5, atol=1e-7)


def test_with_the_outer_adam_it_is_figrs() -> None:
    """Adam takes phi - phi~ for a gradient; two steps, against torch's own with that in `grad`."""
    start, config = Point(0.5, -1.0), {"outer_optimizer": "adam", "outer_betas": (0.9, 0.999)}
    shared, engine = stepped(start, results(start, steps=3, alpha=0.1), 0.05, **config)
    second = results(shared, steps=3, alpha=0.1)
    expected = copy.deepcopy(start)
    optimizer = torch.optim.Adam(expected.parameters(), lr=0.05, betas=(0.9, 0.999))
    for found in (results(start, steps=3, alpha=0.1), second):
        for key, parameter in expected.named_parameters():
            parameter.grad = torch.stack([result.gradients["generator"][key] for result in found]).mean(0)
        optimizer.step()
    outer_step({"generator": engine}, second, 0.05)
    for got, parameter in zip(shared.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, parameter, rtol=1e-6, atol=1e-7)


def test_what_the_inner_loop_leaves_out_stays() -> None:
    inner = inner_loop({"generator": Point()}, PHASES, images(204), images(0), steps=3, lr=0.1, parts=["*.head"])
    found, _ = reptile.gradients(inner)
    assert found["generator"]["body"].item() == 0.0 != found["generator"]["head"].item()
