"""The alarm: a collapsed generator raises it within three evaluations, a perfect sampler in none of 100 runs."""

import pytest
import torch

from training.metrics.collapse import EVALUATIONS, collapse_alarm, collapse_signs

D = 16


def normal(n: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def to_points(points: int, n: int, seed: int, jitter: float = 0.05) -> torch.Tensor:
    """All of the images around so many points of the distribution."""
    places = normal(points, 1000 + seed)
    rows = torch.randint(points, (n,), generator=torch.Generator().manual_seed(seed))
    return places[rows] + normal(n, 2000 + seed, jitter)


def test_a_perfect_sampler_raises_no_alarm_in_100_runs() -> None:
    for run in range(100):
        real = normal(100, 10_000 + run)
        evaluations = [collapse_signs(normal(150, 100 * run + i), real) for i in range(EVALUATIONS)]
        assert not any(one["collapsed"] for one in evaluations)
        assert not collapse_alarm(evaluations)
    assert evaluations[0]["spread"] == pytest.approx(1, abs=0.1)
    assert evaluations[0]["coverage_share"] == pytest.approx(1, abs=0.15)
    assert evaluations[0]["repeats"] < 0.1


@pytest.mark.parametrize("points", [1, 3, 10])
def test_a_collapsed_generator_raises_it_at_the_third_evaluation(points: int) -> None:
    real, evaluations = normal(300, 0), []
    alarms = []
    for i in range(EVALUATIONS):
        evaluations.append(collapse_signs(to_points(points, 300, i), real))
        alarms.append(collapse_alarm(evaluations))
    assert alarms == [False, False, True]


def test_one_good_evaluation_ends_the_alarm() -> None:
    bad, good = {"collapsed": True}, {"collapsed": False}
    assert collapse_alarm([good, bad, bad, bad]) and not collapse_alarm([bad, bad, good])
    assert not collapse_alarm([bad, bad, {"error": "no checkpoint"}]) and not collapse_alarm([bad] * 2)


def test_one_sign_alone_is_no_collapse() -> None:
    """A generator that is far off covers nothing, but its images differ as much as the real ones."""
    found = collapse_signs(normal(200, 0) + 20, normal(200, 1))
    assert found["coverage_share"] == 0 and not found["collapsed"]
