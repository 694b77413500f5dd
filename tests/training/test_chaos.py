"""The short form of `make chaos`: two ranks, killed at a random step and inside a checkpoint's writing, then by SIGTERM."""

from __future__ import annotations

import random
from pathlib import Path

from benchmarks.chaos import Setting, chaos, goodput
from tests.toy import toy_recipe


def test_kills_at_random_moments_change_nothing_and_waste_little(tmp_path: Path) -> None:
    setting = Setting(tmp_path / "chaos", ranks=2, zero=0, interval=8, steps=48, step_s=0.02, rng=random.Random(1))
    found = chaos(setting, kills=2, sigterms=1)
    assert found["wasted_steps_sigterm"]["largest"] <= 5
    assert found["wasted_steps_step"]["largest"] <= 2 * setting.interval


def test_goodput_is_what_restart_and_waste_leave() -> None:
    recipe = toy_recipe(Path("none"), snapshot_every_images=160, batch=8)  # 20 steps
    assert goodput(recipe, step_s=0.5, restart_s=20.0, late_steps=2.0, kill_every_s=300.0) == 1 - (20 + 12 * 0.5) / 300
