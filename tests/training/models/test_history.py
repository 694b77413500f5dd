"""The history of generated images against the buffer of the paper, image by image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.models.history import History


def by_hand(size: int, made: Tensor, draws: Tensor) -> tuple[list[float], list[float]]:
    """Zhu et al.'s buffer of single numbers, one after the other: what is shown, and what is kept."""
    kept: list[float] = []
    shown = []
    for value, (exchanged, place) in zip(made.flatten().tolist(), draws.tolist(), strict=True):
        if len(kept) < size:
            kept.append(value)
            shown.append(value)
        elif exchanged < 0.5:
            shown.append(kept[int(place * size)])
            kept[int(place * size)] = value
        else:
            shown.append(value)
    return shown, kept


def test_one_image_at_a_time_is_the_papers_buffer() -> None:
    made, draws = torch.arange(200.0).view(200, 1, 1, 1), torch.rand(200, 2, dtype=torch.float64)
    history = History(7, (1, 1, 1))
    shown = torch.cat([history.exchange(made[i:i + 1], draws[i:i + 1]) for i in range(200)])
    expected, kept = by_hand(7, made, draws)
    assert shown.flatten().tolist() == expected
    assert history.images.flatten().tolist() == kept
    assert int(history.filled) == 7
    assert len(set(expected)) < 200, "old ones were shown"


@pytest.mark.parametrize("batch", [3, 20])
def test_a_batch_is_exchanged_at_once(batch: int) -> None:
    """As one by one but for two images that take the same place: both show what was there before, the later stays. A batch
    larger than the history fills it and exchanges the rest."""
    made, draws = torch.arange(60.0).view(60, 1, 1, 1), torch.rand(60, 2, dtype=torch.float64)
    history, kept = History(7, (1, 1, 1)), [0.0] * 7
    for start in range(0, 60, batch):
        values, drawn = made[start:start + batch], draws[start:start + batch]
        shown = history.exchange(values, drawn).flatten().tolist()
        numbers = [start + i for i in range(batch)]
        kept = [next((float(n) for n in numbers if n == place), value) if place >= start else value
                for place, value in enumerate(kept)]
        before = list(kept)
        for i, number in enumerate(numbers):
            place = int(drawn[i, 1] * 7)
            if number < 7 or drawn[i, 0] >= 0.5:
                assert shown[i] == number
            else:
                assert shown[i] == before[place]
                kept[place] = float(number)
        assert history.images.flatten().tolist() == kept


def test_half_of_what_is_shown_is_old_and_the_state_dict_goes_on() -> None:
    draws = torch.rand(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    history, again = History(50, (1, 2, 2)), History(50, (1, 2, 2))
    made = torch.rand(64, 1, 2, 2)
    history.exchange(made, draws)
    again.load_state_dict(history.state_dict())
    later = torch.rand(64, 1, 2, 2)
    first, second = history.exchange(later, draws), again.exchange(later, draws)
    assert torch.equal(first, second) and torch.equal(history.images, again.images)
    old = (first != later).flatten(1).any(1)
    assert torch.equal(old, draws[:, 0] < 0.5)
