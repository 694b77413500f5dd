"""ADA's controller: it rises with a discriminator that overfits, falls with one that does not, and stays within bounds."""

from __future__ import annotations

import json

import pytest

from data_shards.errors import UserError
from training.augment import AugmentConfig, Strength, adjust, read_strength, strength_at
from training.augment.strength import ADJUST_EVERY_STEPS


def run(sign: float, steps: int, start: float = 0.0, **settings: float) -> Strength:
    state = Strength(start)
    for _ in range(steps):
        state = adjust(state, sign, batch=10, **{"target": 0.6, "speed_images": 1000.0, "limit": 0.8, **settings})
    return state


def test_p_rises_at_the_stated_speed_and_is_bounded() -> None:
    assert run(0.9, 40).p == pytest.approx(0.4)  # 400 images of the 1000 that 0 -> 1 takes
    assert run(0.9, 400).p == pytest.approx(0.8)
    assert run(0.9, 400, limit=0.3).p == pytest.approx(0.3)


def test_p_falls_below_the_target_and_stops_at_zero() -> None:
    assert run(0.3, 40, start=0.5).p == pytest.approx(0.1)
    assert run(0.3, 400, start=0.5).p == 0.0


def test_p_moves_by_the_mean_over_four_steps() -> None:
    state = Strength(0.5)
    for sign in (1.0, 1.0, 1.0):
        state = adjust(state, sign, batch=10, target=0.6, speed_images=1000, limit=0.8)
        assert state.p == 0.5
    state = adjust(state, -1.0, batch=10, target=0.6, speed_images=1000, limit=0.8)  # mean 0.5
    assert state == Strength(0.46) and ADJUST_EVERY_STEPS == 4


def test_p_settles_where_the_sign_meets_the_target() -> None:
    """A discriminator whose sign falls with p, as under ADA: sign = 1 - p, so p -> 0.4."""
    state = Strength()
    for _ in range(2000):
        state = adjust(state, 1 - state.p, batch=10, target=0.6, speed_images=10_000, limit=0.8)
    assert state.p == pytest.approx(0.4, abs=0.005)


def test_state_survives_a_checkpoint() -> None:
    state = run(0.9, 6)
    assert read_strength(json.loads(json.dumps(state.as_json()))) == state and state.steps == 2
    assert read_strength(None) == Strength()
    with pytest.raises(UserError, match="augmentation state"):
        read_strength({"p": 0.5})


def test_strength_is_a_schedule_or_the_state() -> None:
    assert strength_at(AugmentConfig(kind="ada", p=[(0, 0.0), (100, 0.5)]), Strength(0.3), 50) == 0.25
    assert strength_at(AugmentConfig(kind="ada", p="adaptive"), Strength(0.3), 50) == 0.3
    assert strength_at(AugmentConfig(), Strength(0.3), 50) == 0.0
