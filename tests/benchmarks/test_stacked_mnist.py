"""Stacked MNIST: its judge on samplers of known quality, its stacks, and the whole program on made digits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.science import stacked_mnist
from benchmarks.science.stacked_mnist import DIGITS, draw_stacks, judge, main, pack_stacks
from data_shards import Sample, ShardSet, load_images, pack_images
from training.metrics.encoder import Encoder, train_encoder


def made_digits(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Digit d: a bright square in place d of a 3 x 4 board, moved by up to 1 pixel; uint8 (count, 1, 32, 32), labels."""
    rng = np.random.RandomState(seed)
    labels = np.arange(count) % DIGITS
    images = np.zeros((count, 1, 32, 32), np.uint8)
    for image, label in zip(images, labels, strict=True):
        y, x = divmod(label, 4)
        top, left = 4 + 8 * y + rng.randint(-1, 2), 3 + 7 * x + rng.randint(-1, 2)
        image[0, top:top + 6, left:left + 5] = 255
    return images, labels


def made_set(place: Path, name: str, count: int, seed: int, split: str = "train", digit: int | None = None) -> ShardSet:
    images, labels = made_digits(count, seed)
    chosen = [i for i in range(count) if digit is None or labels[i] == digit]
    return pack_images([Sample(f"{split}-{i:05d}", images[i], int(labels[i]), split) for i in chosen], place, name=name,
                       shape=(1, 32, 32), classes=[str(d) for d in range(DIGITS)])


@pytest.fixture(scope="module")
def classifier() -> Encoder:
    images, labels = made_digits(2000, 0)
    return train_encoder(torch.from_numpy(images), torch.from_numpy(labels), classes=DIGITS, seed=0, images_budget=6400,
                         threads=1)


def test_a_perfect_sampler_scores_the_floor(classifier: Encoder) -> None:
    images, _ = made_digits(3000, 1)
    stacks = draw_stacks(torch.from_numpy(images), 5000, 2)
    scores = judge(classifier, torch.from_numpy(np.stack([stacks(i)[0] for i in range(5000)])))
    assert scores["modes"] == pytest.approx(1000 * (1 - math.exp(-5)), abs=6)
    assert scores["mode_kl"] == pytest.approx(999 / (2 * 5000), rel=0.15)


def test_missing_digits_are_missing_modes(classifier: Encoder) -> None:
    images, labels = made_digits(3000, 1)
    stacks = draw_stacks(torch.from_numpy(images[labels < 5]), 5000, 2)
    scores = judge(classifier, torch.from_numpy(np.stack([stacks(i)[0] for i in range(5000)])))
    assert scores["modes"] == 125
    assert scores["mode_kl"] == pytest.approx(math.log(8) + 124 / (2 * 5000), abs=0.01)


def test_one_channel_that_repeats_another_is_a_hundred_modes(classifier: Encoder) -> None:
    images, _ = made_digits(3000, 1)
    stacks = draw_stacks(torch.from_numpy(images), 3000, 2)
    pictures = torch.from_numpy(np.stack([stacks(i)[0] for i in range(3000)]))
    pictures[:, 1] = pictures[:, 0]
    scores = judge(classifier, pictures)
    assert scores["modes"] == 100 and scores["mode_kl"] == pytest.approx(math.log(10), abs=0.03)


def test_a_packed_stack_holds_the_digits_that_were_drawn(tmp_path: Path) -> None:
    digits = made_set(tmp_path / "digits", "digits", 40, 3)
    packed = pack_stacks(digits, tmp_path / "stacks", 25)
    images, _ = load_images(digits, digits.indices())
    stacks, labels = load_images(packed, np.arange(25))
    expected = draw_stacks(images, 25, 0)
    assert sorted(stack.numpy().tobytes() for stack in stacks) == sorted(expected(i)[0].tobytes() for i in range(25))
    assert (labels == -1).all() and len(np.unique(expected.chosen)) > 20


def test_the_program_trains_judges_and_does_nothing_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    sets = {"mnist/source": made_set(tmp_path / "source", "mnist/source", 200, 4)}
    for digit in range(DIGITS):
        name = f"mnist/{digit}"
        sets[name] = made_set(tmp_path / str(digit), name, 100, 5, "reference", digit)
    monkeypatch.setattr(stacked_mnist, "fetch", lambda name, root: SimpleNamespace(sets=sets))
    arguments = ["--images", "512", "--stacks", "256", "--judged", "300", "--classifier-images", "6400", "--rows", "default",
                 "minimax", "--out", str(tmp_path / "out")]
    main(arguments)
    said, rows = capsys.readouterr().out, json.loads((tmp_path / "out" / "rows.json").read_text())
    assert "reads 100 of 100 test digits" in said and "| minimax | 512 |" in said
    assert [point["images"] for point in rows["minimax"]["curve"]] == [64, 128, 192, 256, 320, 384, 448, 512]
    assert rows["real"]["curve"][0]["modes"] > 200 >= rows["default"]["curve"][-1]["modes"]
    assert rows["default"]["curve"] != rows["minimax"]["curve"]
    main(arguments)
    assert "images/s" not in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "rows.json").read_text())["minimax"]["curve"] == rows["minimax"]["curve"]
