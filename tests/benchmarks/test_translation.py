"""A short seeded form of the translation of digits: the translator inverts them and keeps the digit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from benchmarks.science.translation import make_sets, run
from data_shards import Sample, ShardSet, load_images, open_set, pack_images


def small_digits(folder: Path, count: int = 1797) -> ShardSet:
    """The handwritten digits that come with scikit-learn (UCI), 8 px, at twice their size."""
    digits = load_digits()
    images = (digits.images[:count] * (255 / 16)).round().astype(np.uint8).repeat(2, axis=1).repeat(2, axis=2)
    samples = [Sample(f"{i:05d}", image[None], int(label), "train")
               for i, (image, label) in enumerate(zip(images, digits.target[:count], strict=True))]
    return pack_images(samples, folder, name="digits", shape=(1, 16, 16), classes=[str(digit) for digit in range(10)])


def test_no_digit_is_in_two_sets(tmp_path: Path) -> None:
    digits = small_digits(tmp_path / "digits", 120)
    inside, labels = make_sets(digits, tmp_path, 0, 50, 20)
    parts = {name: load_images(open_set(tmp_path / name), np.arange(len(open_set(tmp_path / name))))[0] for name in "ab"}
    assert torch.equal(parts["b"], inside) and len(labels) == 50
    seen = {image.numpy().tobytes() for image in parts["a"]} | {(255 - image).numpy().tobytes() for image in parts["b"]}
    assert len(seen) == 100


@pytest.mark.slow
def test_a_classifier_reads_translated_digits(tmp_path: Path) -> None:
    found = run(0, 4000, small_digits(tmp_path / "digits"), tmp_path / "work", each=700, tested=390, budget=8000)
    assert found["real"] > 0.95
    assert found["untranslated"] < 0.5
    assert found["translated"] >= 0.9
