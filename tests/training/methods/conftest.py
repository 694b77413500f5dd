"""A run to adapt in: an encoder, a target set, and starts of any model."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_shards import load_images
from tests.toy import toy_set
from training.metrics.encoder import save_encoder, train_encoder


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with an encoder in it and a target set beside it."""
    root = tmp_path_factory.mktemp("methods")
    source = toy_set(root / "source")
    toy_set(root / "target", train=24, reference=24, seed=5)
    images, labels = load_images(source, source.indices())
    save_encoder(train_encoder(images, labels, classes=2, seed=0, images_budget=256, threads=1),
                 root / "run" / "encoder.safetensors")
    return root / "run"
