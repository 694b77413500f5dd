"""Augmentation: gradients, identity at p = 0, the stated distributions, hand-made expectations, independence of the split."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from training.augment import AUGMENTATIONS, AugmentConfig, augment
from training.augment.ada import _affine, _color, _geometry, _resample, _rotation
from training.draws import uniforms
from training.world import World

IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
ALL = [(kind, [name]) for kind, found in AUGMENTATIONS.items() for name in found.transforms]


def draws(kind: str, n: int = 6, seed: int = 1) -> Tensor:
    return torch.rand(n, AUGMENTATIONS[kind].draws, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("kind", "transforms"), [*ALL, ("diffaugment", None), ("ada", None)])
def test_gradients_flow_to_the_image(kind: str, transforms: list[str] | None) -> None:
    """gradcheck against finite differences in float64; the penalties differentiate D, not the augmentation, twice."""
    apply, names = AUGMENTATIONS[kind].apply, transforms or AUGMENTATIONS[kind].transforms
    images = IMAGES[:2, :, :4, :5].clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: apply(x, draws(kind, 2), 1.0, names), (images,))


@pytest.mark.parametrize(("kind", "transforms"), ALL)
def test_every_transform_changes_the_image(kind: str, transforms: list[str]) -> None:
    changed = AUGMENTATIONS[kind].apply(IMAGES, draws(kind), 1.0, transforms)
    assert changed.shape == IMAGES.shape and (changed - IMAGES).abs().amax((1, 2, 3)).max() > 0.05


@pytest.mark.parametrize("kind", AUGMENTATIONS)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_any_channel_count_and_shape(kind: str, channels: int) -> None:
    images = torch.randn(5, channels, 12, 10, generator=torch.Generator().manual_seed(2))
    result = augment(AugmentConfig(kind=kind), images, draws(kind, 5), 0.7)
    assert result.shape == images.shape and result.dtype == torch.float32 and bool(torch.isfinite(result).all())


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_p_zero_is_the_identity_bit_for_bit(kind: str) -> None:
    images = IMAGES.float()
    assert augment(AugmentConfig(kind=kind), images, draws(kind), 0.0) is images
    assert torch.equal(AUGMENTATIONS[kind].apply(images, draws(kind), 0.0, AUGMENTATIONS[kind].transforms), images)
    assert augment(AugmentConfig(), images, draws(kind), 1.0) is images


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_an_image_that_nothing_was_drawn_for_keeps_its_bits(kind: str) -> None:
    images = torch.randn(4000, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    name = {"diffaugment": "color", "ada": "rotate"}[kind]
    changed = AUGMENTATIONS[kind].apply(images, draws(kind, 4000), 0.3, [name])
    share = float((changed != images).any(-1).any(-1).any(-1).float().mean())
    assert share == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 4000))  # four standard errors


def test_no_autocast_inside() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = augment(AugmentConfig(kind="ada"), IMAGES.float(), draws("ada"), 1.0)
    assert torch.equal(inside, augment(AugmentConfig(kind="ada"), IMAGES.float(), draws("ada"), 1.0))


# DiffAugment by hand.


def test_diffaugment_color_is_the_papers() -> None:
    u = draws("diffaugment")
    expected = []
    for image, row in zip(IMAGES, u, strict=True):
        x = image + (row[1] - 0.5)
        x = x.mean(0, keepdim=True) + (x - x.mean(0, keepdim=True)) * 2 * row[2]
        expected.append(x.mean() + (x - x.mean()) * (0.5 + row[3]))
    result = AUGMENTATIONS["diffaugment"].apply(IMAGES, u, 1.0, ["color"])
    torch.testing.assert_close(result, torch.stack(expected))


def test_diffaugment_moves_by_up_to_an_eighth_and_fills_with_zero() -> None:
    n = 4000
    images = torch.ones(n, 1, 16, 16)
    moved = AUGMENTATIONS["diffaugment"].apply(images, draws("diffaugment", n), 1.0, ["translation"])
    rows, columns = (moved.amax((1, axis)).sum(1) for axis in (3, 2))  # of 16: 14, 15 and 16 for shifts of 2, 1 and 0
    for found in (rows, columns):
        shares = [float((found == 16 - shift).float().mean()) for shift in range(4)]
        assert shares == pytest.approx([0.2, 0.4, 0.4, 0.0], abs=0.035)


def test_diffaugment_cuts_out_a_square_of_half_the_side() -> None:
    n = 2000
    holes = 1 - AUGMENTATIONS["diffaugment"].apply(torch.ones(n, 1, 16, 16), draws("diffaugment", n), 1.0, ["cutout"])
    heights = holes.amax((1, 3)).sum(1)
    assert float(heights.max()) == 8 and float(heights.min()) == 4  # cropped where the centre is at the border
    assert torch.equal(holes.sum((1, 2, 3)), heights * holes.amax((1, 2)).sum(1))


# ADA against hand-made geometry and against the stated distributions.


def test_quarter_turns_and_flips_are_exact() -> None:
    image = IMAGES[:1]
    for quarter in range(4):
        turned = _resample(image, _rotation(torch.tensor([quarter * math.pi / 2], dtype=torch.float64)))
        assert any(torch.allclose(turned, torch.rot90(image, k, (2, 3))) for k in ([0], [1, 3], [2], [1, 3])[quarter])
    torch.testing.assert_close(_resample(image, _affine(-torch.ones(1))), image.flip(3))


def test_a_shift_moves_by_that_many_pixels() -> None:
    moved = _resample(IMAGES, _affine(dx=-2.0, dy=1.0).expand(6, 3, 3))
    torch.testing.assert_close(moved[:, :, :-1, 2:], IMAGES[:, :, 1:, :-2])
    torch.testing.assert_close(moved[:, :, :-1, 0], IMAGES[:, :, 1:, 1])  # reflected at the border


def test_rotation_does_not_shear_an_oblong_image() -> None:
    """A quarter turn of a (4, 8) image takes its centre square to the turned centre square."""
    image = torch.arange(32.0, dtype=torch.float64).view(1, 1, 4, 8)
    turned = _resample(image, _rotation(torch.tensor([math.pi / 2], dtype=torch.float64)))[:, :, :, 2:6]
    assert any(torch.allclose(turned, torch.rot90(image[:, :, :, 2:6], k, (2, 3))) for k in (1, 3))


def test_geometry_follows_the_stated_distributions() -> None:
    n = 20_000
    u = torch.rand(n, AUGMENTATIONS["ada"].draws, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def of(name: str, p: float = 1.0) -> tuple[Tensor, Tensor]:
        return _geometry(u, p, [name], 64, 64)

    matrix, moved = of("flip", 0.5)
    assert float(moved.float().mean()) == pytest.approx(0.25, abs=0.015)  # drawn with p, and then a flip in half of the cases
    assert float((matrix[:, 0, 0] == -1).float().mean()) == pytest.approx(0.25, abs=0.015)
    assert float(of("rotate90")[1].float().mean()) == pytest.approx(0.75, abs=0.015)
    shift = of("shift")[0][:, :2, 2]
    assert torch.equal(shift, shift.round()) and float(shift.abs().max()) == 8
    assert float(shift.std()) == pytest.approx(16 / math.sqrt(12), rel=0.03)
    scale = of("scale")[0]
    assert torch.equal(scale[:, 0, 0], scale[:, 1, 1])
    assert float(scale[:, 0, 0].log2().std()) == pytest.approx(0.2, rel=0.03)
    stretch = of("stretch")[0]
    torch.testing.assert_close(stretch[:, 0, 0] * stretch[:, 1, 1], torch.ones(n, dtype=torch.float64))
    assert float(stretch[:, 0, 0].log2().std()) == pytest.approx(0.2, rel=0.03)
    fractional = of("fractional_shift")[0][:, :2, 2]
    assert float(fractional.std()) == pytest.approx(0.125 * 64, rel=0.03)
    matrix, moved = of("rotate", 0.4)
    assert float(moved.float().mean()) == pytest.approx(0.4, abs=0.015)  # of two chances, one or both
    angle = torch.atan2(matrix[:, 0, 1], matrix[:, 0, 0])[moved]
    assert float(angle.std()) == pytest.approx(2 * math.pi / math.sqrt(12), rel=0.05)
    assert bool((matrix.det() - 1).abs().max() < 1e-9)


def test_colors_follow_the_stated_distributions() -> None:
    n = 20_000
    u = torch.rand(n, AUGMENTATIONS["ada"].draws, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    assert float(_color(u, 1.0, ["brightness"], 3)[1].std()) == pytest.approx(0.2, rel=0.03)
    assert float(_color(u, 1.0, ["contrast"], 3)[0][:, 0, 0].log2().std()) == pytest.approx(0.5, rel=0.03)
    flip = _color(u, 1.0, ["luma_flip"], 3)[0]
    assert float((flip.det() < 0).float().mean()) == pytest.approx(0.5, abs=0.015)
    grey, red = torch.ones(3, dtype=torch.float64), torch.tensor([2.0, -1.0, -1.0], dtype=torch.float64)
    flipped = flip[flip.det() < 0]
    torch.testing.assert_close(flipped @ grey, -grey.expand(len(flipped), 3))
    torch.testing.assert_close(flipped @ red, red.expand(len(flipped), 3))
    hue = _color(u, 1.0, ["hue"], 3)[0]
    torch.testing.assert_close(hue @ grey, grey.expand(n, 3))
    torch.testing.assert_close(hue @ hue.mT, torch.eye(3, dtype=torch.float64).expand(n, 3, 3))
    assert float((hue @ red / red.norm()).std(0).mean()) == pytest.approx(1 / math.sqrt(3), rel=0.03)  # all around the circle
    saturation = _color(u, 1.0, ["saturation"], 3)[0]
    torch.testing.assert_close(saturation @ grey, grey.expand(n, 3))
    assert float(((saturation @ red)[:, 0] / 2).log2().std()) == pytest.approx(1.0, rel=0.03)
    assert torch.equal(_color(u, 1.0, ["hue", "saturation"], 1)[0], torch.ones(n, 1, 1, dtype=torch.float64))


def test_leaving_a_transform_out_leaves_the_others_draws() -> None:
    u = draws("ada", 50)
    both = _geometry(u, 1.0, ["flip", "fractional_shift"], 8, 8)[0]
    alone = [_geometry(u, 1.0, [name], 8, 8)[0] for name in ("flip", "fractional_shift")]
    torch.testing.assert_close(both, alone[0] @ alone[1])


def test_a_split_batch_gets_the_same_augmentation() -> None:
    config, images = AugmentConfig(kind="ada"), IMAGES.float()
    whole = augment(config, images, uniforms(7, "x", 640, 6, config.draws()), 0.8)
    for size in (2, 3):
        for rank in range(size):
            world = World(rank, size)
            share = augment(config, world.slice(images), uniforms(7, "x", 640, 6, config.draws(), world), 0.8)
            torch.testing.assert_close(share, world.slice(whole))
    assert not torch.equal(whole, augment(config, images, uniforms(7, "y", 640, 6, config.draws()), 0.8))


@pytest.mark.parametrize(("fields", "words"), [
    ({"kind": "autoaugment"}, "diffaugment, ada"), ({"kind": "ada", "transforms": ["cutout"]}, "flip, rotate90"),
    ({"kind": "ada", "p": 1.5}, "at most 1"), ({"kind": "ada", "p": [[0, 0.0], [100, 2.0]]}, "at most 1"),
    ({"kind": "ada", "limit": 1.5}, "less than or equal to 1"), ({"transforms": ["cutout"]}, "need a kind")])
def test_wrong_settings_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        AugmentConfig.model_validate(fields)
