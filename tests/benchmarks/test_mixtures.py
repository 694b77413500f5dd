"""The 2-D benchmark: its judge on samplers of known quality, its stacked networks, and a short form of what it shows."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.science.mixtures import MIXTURES, ROWS, Mixture, Row, geometric, judge, main, train
from benchmarks.science.stacked import Discriminator, Generator


@pytest.mark.parametrize("name", MIXTURES)
def test_a_perfect_sampler_is_judged_perfect(name: str) -> None:
    mixture = MIXTURES[name]
    scores = judge(mixture.sample(20_000, torch.Generator().manual_seed(0)), mixture)
    k = len(mixture.means)
    assert scores["modes"] == k == {"ring": 8, "grid": 25}[name]
    assert scores["high_quality"] == pytest.approx(1 - math.exp(-4.5), abs=0.003)  # P(|x| < 3) of a 2-D standard normal
    assert scores["kl"] == pytest.approx((k - 1) / (2 * 20_000), rel=1)


def test_missing_modes_and_stray_points_are_seen() -> None:
    ring = MIXTURES["ring"]
    three = Mixture(ring.means[:3], ring.sd).sample(6000, torch.Generator().manual_seed(1))
    scores = judge(torch.cat([three, torch.zeros(6000, 2)]), ring)
    assert scores["modes"] == 3 and scores["high_quality"] == pytest.approx(0.4945, abs=0.005)
    assert scores["kl"] == pytest.approx(math.log(8 / 3), abs=0.01)
    assert judge(torch.zeros(10, 2), ring) == {"modes": 0.0, "high_quality": 0.0, "kl": math.inf}


def test_a_copy_is_what_it_would_be_alone() -> None:
    z = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(2))
    for batch_norm in (False, True):
        together = Generator([4, 5, 6], hidden=16, batch_norm=batch_norm)(z)
        alone = Generator([5], hidden=16, batch_norm=batch_norm)(z[1:2])
        torch.testing.assert_close(together[1:2], alone)
    torch.testing.assert_close(Discriminator([4, 5, 6], hidden=8)(z)[1:2], Discriminator([5], hidden=8)(z[1:2]))


def test_seeds_in_a_stack_train_as_they_would_alone() -> None:
    row = Row("relativistic", {"r1": 0.01, "gp1": 0.01}, packed=2, hidden=(16, 8), lr=1e-3)
    together = train(row, MIXTURES["grid"], [0, 1], 20)
    assert together[1] == pytest.approx(train(row, MIXTURES["grid"], [1], 20)[0], rel=0.02)


def test_the_default_finds_every_mode_where_the_plain_gan_has_not_begun_to() -> None:
    """A short form of the ring: modes five times as wide, small networks, 400 steps, three seeds."""
    ring, steps = Mixture(MIXTURES["ring"].means, 0.05), 400
    default = replace(ROWS["default"], hidden=(64, 32), lr=[(0.5, 2e-3), (1.0, 1e-4)],
                      penalties=dict.fromkeys(("r1", "r2"), geometric(0.5, 0.01, 0.6)))
    ours = train(default, ring, [0, 1, 2], steps)
    plain = train(replace(ROWS["GAN"], hidden=(64, 32)), ring, [0, 1, 2], steps)
    assert [scores["modes"] for scores in ours] == [8, 8, 8]
    assert max(scores["kl"] for scores in ours) < 0.15 < sum(scores["kl"] for scores in plain) / 3
    assert min(scores["high_quality"] for scores in ours) > max(scores["high_quality"] for scores in plain)


def test_the_program_writes_every_seed_s_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--steps", "2", "--seeds", "2", "--rows", "PacGAN2", "--processes", "1", "--out", str(tmp_path / "x.json")])
    saved = json.loads((tmp_path / "x.json").read_text())
    assert saved["steps"] == 2 and {m: len(s) for m, s in saved["rows"]["PacGAN2"].items()} == {"ring": 2, "grid": 2}
    assert "| PacGAN2 | 2 |" in capsys.readouterr().out
