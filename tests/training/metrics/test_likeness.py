"""Copies that are pale, blurred, noisy or moved are caught; real images, blurs and means of others are not."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_shards.errors import UserError
from training.metrics.copying import copy_rate, is_copier
from training.metrics.likeness import Pictures, as_rows, likeness, likeness_threshold


def drawings(n: int, generator: torch.Generator, size: int = 32) -> Tensor:
    """Random closed strokes: as unlike each other as drawings of one class."""
    angle = torch.linspace(0, 2 * torch.pi, 200)
    radius = 9 + (torch.randn(n, 4, 1, generator=generator) * torch.tensor([2.5, 2.0, 1.5, 1.0]).view(1, 4, 1)
                  * torch.cos(torch.arange(1, 5).view(1, 4, 1) * angle + 6.3 * torch.rand(n, 4, 1, generator=generator))).sum(1)
    middle = 16 + 2 * torch.randn(n, 2, 1, generator=generator)
    x, y = (middle[:, 0] + radius * torch.cos(angle)), (middle[:, 1] + radius * torch.sin(angle))
    images = torch.zeros(n, 1, 32, 32, dtype=torch.uint8)
    images[torch.arange(n)[:, None], 0, y.round().long().clamp(0, 31), x.round().long().clamp(0, 31)] = 255
    return images if size == 32 else F.interpolate(images.float(), size=size).to(torch.uint8)


def blurred(images: Tensor) -> Tensor:
    kernel = torch.tensor([1, 4, 6, 4, 1.0]) / 16
    x = F.conv2d(images.float(), kernel.view(1, 1, 1, 5), padding=(0, 2))
    return F.conv2d(x, kernel.view(1, 1, 5, 1), padding=(2, 0)).round().to(torch.uint8)


def noisy(images: Tensor) -> Tensor:
    noise = 24 * torch.randn(images.shape, generator=torch.Generator().manual_seed(9))
    return (images + noise).clamp(0, 255).to(torch.uint8)


def rate(fake: Tensor, support: Tensor, held_back: Tensor) -> float:
    """The copy rate by pixels alone: every feature is far from every other."""
    far = [1000.0 * k + torch.randn(len(part), 8, generator=torch.Generator().manual_seed(k))
           for k, part in enumerate((fake, support, held_back))]
    return copy_rate(far[0] + 1e6, far[1], far[2], pictures=Pictures(fake, support, held_back))


@pytest.mark.parametrize("spoil", [lambda x: x, lambda x: x // 2, lambda x: x // 2 + 60, blurred, lambda x: blurred(x) // 3,
                                   noisy])
def test_a_spoilt_copy_is_a_copy(spoil: Callable[[Tensor], Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    support, held_back = drawings(10, generator), drawings(40, generator)
    fake = spoil(support.repeat(10, 1, 1, 1))
    assert rate(fake, support, held_back) > 0.95
    assert rate(spoil(drawings(100, generator)), support, held_back) < 0.15


def test_reals_score_at_most_five_percent_and_the_mean_of_many_is_no_copy() -> None:
    generator, rates, caught = torch.Generator().manual_seed(1), [], 0
    for _ in range(60):
        support, held_back, fresh = (drawings(n, generator) for n in (10, 40, 200))
        rates.append(rate(fresh, support, held_back))
        caught += is_copier(rates[-1], 200)[0]
    assert sum(rates) / len(rates) == pytest.approx(0.025, abs=0.012)
    assert caught == 0
    mean = held_back.float().mean(0, keepdim=True).repeat(100, 1, 1, 1)
    assert rate(noisy(mean.to(torch.uint8)), support, held_back) < 0.1


def test_large_pools_and_large_pictures() -> None:
    generator = torch.Generator().manual_seed(2)
    support, held_back, fresh = (drawings(n, generator, size=64) for n in (10, 420, 300))
    assert as_rows(fresh).shape == (300, 32 * 32)
    assert rate(fresh, support, held_back) < 0.07
    assert rate(blurred(support.repeat(4, 1, 1, 1)), support, held_back) == 1.0


def test_rows_do_not_see_brightness_and_contrast() -> None:
    image = drawings(3, torch.Generator().manual_seed(3))
    torch.testing.assert_close(as_rows(image), as_rows(image // 5 + 40))
    assert as_rows(torch.full((1, 3, 8, 8), 7, dtype=torch.uint8)).abs().max() == 0


def test_likeness_by_hand() -> None:
    assert likeness(torch.tensor([[2.0, 4.0, 6.0], [0.0, 1.0, 1.0]]).double()).tolist() == [0.4, 0.0]
    rows = torch.tensor([[0.0], [1.0], [4.0]], dtype=torch.float64)
    found = likeness_threshold(rows[:2], rows[2:], 50.0)  # every split is as likely: 1/4, 3/4 or 1/3
    assert found == pytest.approx(1 / 3)


def test_mistakes() -> None:
    pictures = drawings(4, torch.Generator().manual_seed(4))
    with pytest.raises(UserError, match="uint8"):
        as_rows(pictures.float())
    with pytest.raises(UserError, match="differ in number"):
        copy_rate(torch.zeros(3, 2), torch.ones(4, 2), torch.ones(4, 2), pictures=Pictures(pictures, pictures, pictures))
